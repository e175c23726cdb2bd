// rnn_scan on the CPU: forward and backward through time, on raw pointers, compiled once per ISA.
//
// A unit is a block of batch items of one head, which it takes through all tokens: h meets the head's weights in one
// product per token, [items, D] by [D, gates * D], whose result the cell turns into the next states. Weights are
// transposed into the workspace first.
// Backward: gates are computed again from the states before. dh of the token before is [items, gates * D] by the
// weights as they are; the gradient of the weights is a product over many tokens at once, into a slice per unit, and
// slices are added in order. There are only so many slices: where the batch is large, a unit has several blocks.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace rnn_scan_impl {

using Params = RnnScanParams;

template <RnnCell kCell>
constexpr int kGates = kCell == RnnCell::kGru ? 3 : 4;
template <RnnCell kCell>
constexpr int kStates = kCell == RnnCell::kGru    ? 1
                        : kCell == RnnCell::kLstm ? 2
                                                  : 4;

constexpr int64_t kPartBytes = 2 << 20;  // of slices, at least one for each of so many units
constexpr int64_t kLeastParts = 16;

struct Plan {
  int D, Dp, columns, ldg;  // head dim, rounded up to whole vectors; columns of all gates, and their row stride
  int64_t rows, blocks;  // batch items of a block; blocks of a head, which are units in forward
  int64_t parts;  // units of a head in backward, of one block or more
  int64_t buffered;  // tokens whose gradients meet states in one product
  int64_t head_floats, part_floats;  // workspace of a head's weights; of a unit's gradients of these

  explicit Plan(const Params& p) : D(static_cast<int>(p.D)) {
    const bool small = small_tiles();
    Dp = round_up(D, kLanes);
    columns = static_cast<int>(p.G) * Dp;
    ldg = columns + 16;
    // Enough units for some threads, of at least 4 items, so that a weight that is read is used more than once.
    rows = std::clamp<int64_t>(ceil_div(p.B * p.H, 8), std::min<int64_t>(p.B, small ? 1 : 4), small ? 2 : 48);
    rows = std::min(rows, p.B);
    blocks = ceil_div(p.B, rows);
    buffered = std::max<int64_t>(1, (small ? 4 : 64) / rows);
    head_floats = int64_t{D} * ldg + int64_t{columns} * Dp;
    part_floats = int64_t{columns} * (Dp + 1);
    const int64_t fit = kPartBytes / (part_floats * static_cast<int64_t>(sizeof(float)));
    parts = ceil_div(small ? 2 : std::max(fit, kLeastParts), std::max<int64_t>(p.H, 1));
    parts = std::min(parts, blocks);
  }
  float* transposed(float* workspace, int64_t head) const { return workspace + head * head_floats; }
  float* straight(float* workspace, int64_t head) const { return transposed(workspace, head) + int64_t{D} * ldg; }
  float* part(float* workspace, const Params& p, int64_t unit) const {
    return workspace + p.H * head_floats + unit * part_floats;
  }
};

// ---- functions -----------------------------------------------------------------------------------------------------

EFFVIT_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exp_full(-x)); }

// Relative error 6e-8: an odd polynomial below 1/2, exponentials from there on. A NaN stays.
EFFVIT_INLINE vf tanh(vf x) {
  const vf t = min(max(x, -x), set1(10.f)), z = t * t;
  vf p = fma(z, set1(-0.00665357f), set1(0.0213017f));
  p = fma(z, p, set1(-0.05389997f));
  p = fma(z, p, set1(0.13332971f));
  p = fma(z, p, set1(-0.33333327f));
  const vf near = fma(t * z, p, t), far = 1.f - 2.f / (exp(t + t) + 1.f);
  const vf y = t < set1(0.5f) ? near : far;
  const vf signed_y = x < vf{} ? -y : y;
  return x == x ? signed_y : x;
}

// log sigmoid(x)
EFFVIT_INLINE vf log_sigmoid(vf x) {
  const vf y = min(x, vf{}) - log(1.f + exp(min(x, -x)));
  return x == x ? y : x;
}

// exp(x - top), x up to top; NaN where both are -infinity, as in the definition.
EFFVIT_INLINE vf exp_below(vf x, vf top) { return exp(x - top); }

// ---- weights -------------------------------------------------------------------------------------------------------

// Of gate g of a head: rows o to wt[i, g Dp + o] and, for backward, to w[g Dp + o, i] with zeros around.
template <class T>
void prepare(const Params& p, const Plan& g, float* workspace, int64_t begin, int64_t end) {
  float* const rows = static_cast<float*>(thread_scratch(static_cast<size_t>(kLanes) * g.Dp * sizeof(float)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / p.G, gate = unit % p.G;
    const T* const from = static_cast<const T*>(p.weight) + head * p.weight_stride_h + gate * p.weight_stride_g;
    float* const wt = g.transposed(workspace, head) + gate * g.Dp;
    float* const w = g.straight(workspace, head) + gate * g.Dp * g.Dp;
    for (int o = 0; o < g.D; o += kLanes) {
      const int n = std::min(kLanes, g.D - o);
      for (int i = 0; i < n; ++i) load_row(rows + i * g.Dp, from + (o + i) * p.weight_stride_o, g.D);
      transpose_rows(wt + o, g.ldg, n, g.D, [&](int i) { return rows + i * g.Dp; });
      std::memcpy(w + int64_t{o} * g.Dp, rows, static_cast<size_t>(n) * g.Dp * sizeof(float));
    }
    zero(w + int64_t{g.D} * g.Dp, int64_t{g.Dp - g.D} * g.Dp);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, RnnCell kCell>
struct Scan {
  static constexpr int G = kGates<kCell>, S = kStates<kCell>;
  const Params& p;
  const Plan& g;
  float *bias, *pre;

  Scan(const Params& params, const Plan& plan, Scratch& s) : p(params), g(plan) {
    bias = s.take<float>(g.columns);
    pre = s.take<float>(g.rows * g.ldg);
  }

  void load_bias(int64_t head) {
    for (int gate = 0; gate < G; ++gate) {
      if (p.bias) {
        load_row(bias + gate * g.Dp, static_cast<const T*>(p.bias) + gate * p.bias_stride_g + head * p.bias_stride_h,
                 g.D);
      } else {
        zero(bias + gate * g.Dp, g.Dp);
      }
    }
  }
  const T* x(int64_t b, int64_t t, int64_t head) const {
    return static_cast<const T*>(p.x) + b * p.x_stride_b + t * p.x_stride_l + head * p.x_stride_h;
  }
  float* state(float* base, int64_t b, int64_t t, int s, int64_t head) const {
    return base + (((b * p.L + t) * S + s) * p.H + head) * p.D;
  }
  const float* initial(int64_t b, int s, int64_t head) const {
    return p.initial ? p.initial + ((b * S + s) * p.H + head) * p.D : nullptr;
  }
  // A vector of a state before the first token.
  EFFVIT_INLINE vf first_state(int64_t b, int s, int64_t head, int c) const {
    if (p.initial) return load_lanes(initial(b, s, head) + c, g.D - c);
    return kCell == RnnCell::kSlstm && s == 3 ? set1(-INFINITY) : vf{};
  }
  // Pre-activations from x and the recurrent part.
  EFFVIT_INLINE vf gate_of(const T* x_row, const float* rec, int gate, int c) const {
    return load_lanes(x_row + gate * p.x_stride_g + c, g.D - c) + rec_of(rec, gate, c);
  }
  EFFVIT_INLINE vf rec_of(const float* rec, int gate, int c) const {
    return load(rec + gate * g.Dp + c) + load(bias + gate * g.Dp + c);
  }
};

template <class T, RnnCell kCell>
struct Forward : Scan<T, kCell> {
  using Base = Scan<T, kCell>;
  using Base::g;
  using Base::G;
  using Base::p;
  using Base::S;
  float* states[S];  // [rows, Dp] each

  Forward(const Params& params, const Plan& plan, Scratch& s) : Base(params, plan, s) {
    for (float*& x : states) x = s.take<float>(g.rows * g.Dp);
  }

  void run(float* workspace, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.blocks, b = unit % g.blocks * g.rows;
      const int rows = static_cast<int>(std::min(g.rows, p.B - b));
      const float* const wt = g.transposed(workspace, head);
      this->load_bias(head);
      for (int s = 0; s < S; ++s) {
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < g.D; c += kLanes) store(states[s] + r * g.Dp + c, this->first_state(b + r, s, head, c));
        }
      }
      for (int64_t t = 0; t < p.L; ++t) {
        gemm(rows, g.columns, g.D, states[0], g.Dp, wt, g.ldg, nullptr, this->pre, g.ldg);
        for (int r = 0; r < rows; ++r) step(b + r, t, head, r);
      }
    }
  }

  void step(int64_t b, int64_t t, int64_t head, int r) {
    const T* const x = this->x(b, t, head);
    const float* const rec = this->pre + r * g.ldg;
    T* const out = static_cast<T*>(p.out) + ((b * p.L + t) * p.H + head) * p.D;
    for (int c = 0; c < g.D; c += kLanes) {
      vf state[S];
      for (int s = 0; s < S; ++s) state[s] = load(states[s] + r * g.Dp + c);
      if constexpr (kCell == RnnCell::kLstm) {
        const vf i = sigmoid(this->gate_of(x, rec, 0, c)), f = sigmoid(this->gate_of(x, rec, 1, c));
        const vf n = tanh(this->gate_of(x, rec, 2, c)), o = sigmoid(this->gate_of(x, rec, 3, c));
        state[1] = f * state[1] + i * n;
        state[0] = o * tanh(state[1]);
      } else if constexpr (kCell == RnnCell::kGru) {
        const vf reset = sigmoid(this->gate_of(x, rec, 0, c)), z = sigmoid(this->gate_of(x, rec, 1, c));
        const vf n = tanh(load_lanes(x + 2 * p.x_stride_g + c, g.D - c) + reset * this->rec_of(rec, 2, c));
        state[0] = (1.f - z) * n + z * state[0];
      } else {
        const vf i = this->gate_of(x, rec, 0, c), kept = log_sigmoid(this->gate_of(x, rec, 1, c)) + state[3];
        const vf z = tanh(this->gate_of(x, rec, 2, c)), o = sigmoid(this->gate_of(x, rec, 3, c));
        const vf top = max(kept, i), in = exp_below(i, top), forget = exp_below(kept, top);
        state[1] = forget * state[1] + in * z;
        state[2] = forget * state[2] + in;
        state[3] = top;
        state[0] = o * state[1] / state[2];
      }
      for (int s = 0; s < S; ++s) {
        store(states[s] + r * g.Dp + c, state[s]);
        store_lanes(this->state(p.trace, b, t, s, head) + c, state[s], g.D - c);
      }
      store_lanes(out + c, state[0], g.D - c);
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T, RnnCell kCell>
struct Backward : Scan<T, kCell> {
  using Base = Scan<T, kCell>;
  using Base::g;
  using Base::G;
  using Base::p;
  using Base::S;
  float* carried[S];  // gradients of the states of the token before: [rows, Dp] each
  float *before, *direct, *drec;  // h before [tokens, rows, Dp]; dh past the weights; gradients of the recurrent part
  float *part, *other;  // [columns, Dp], then [columns]; `other` of all blocks of a unit but the first

  Backward(const Params& params, const Plan& plan, Scratch& s) : Base(params, plan, s) {
    for (float*& x : carried) x = s.take<float>(g.rows * g.Dp);
    before = s.take<float>(g.buffered * g.rows * g.Dp);
    direct = s.take<float>(g.rows * g.Dp);
    drec = s.take<float>(g.buffered * g.rows * g.ldg);
    other = s.take<float>(g.parts < g.blocks ? g.part_floats : 0);
  }

  void run(float* workspace, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g.parts, index = unit % g.parts;
      const int64_t first = g.blocks * index / g.parts, last = g.blocks * (index + 1) / g.parts;
      float* const sum = g.part(workspace, p, unit);
      this->load_bias(head);
      for (int64_t i = first; i < last; ++i) {
        part = i == first ? sum : other;
        block(g.transposed(workspace, head), g.straight(workspace, head), head, i * g.rows);
        if (i > first) axpy(sum, 1.f, part, static_cast<int>(g.part_floats));
      }
    }
  }

  void block(const float* wt, const float* w, int64_t head, int64_t b) {
    const int rows = static_cast<int>(std::min(g.rows, p.B - b));
    for (float* x : carried) zero(x, g.rows * g.Dp);
    zero(part + int64_t{g.columns} * g.Dp, g.columns);
    bool first = true;
    int n = 0;  // rows in the buffers
    for (int64_t t = p.L - 1; t >= 0; --t) {
      float* const h = before + int64_t{n} * g.Dp;
      float* const d = drec + int64_t{n} * g.ldg;
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < g.D; c += kLanes) store(h + r * g.Dp + c, state_before(b + r, t, 0, head, c));
      }
      gemm(rows, g.columns, g.D, h, g.Dp, wt, g.ldg, nullptr, this->pre, g.ldg);
      for (int r = 0; r < rows; ++r) step(b + r, t, head, r, d + r * g.ldg);
      constexpr bool kDirect = kCell == RnnCell::kGru;
      gemm(rows, g.Dp, g.columns, d, g.ldg, w, g.Dp, kDirect ? direct : nullptr, carried[0], g.Dp);
      n += rows;
      if (n + rows > g.buffered * g.rows || t == 0) {
        gemm_transposed(g.columns, g.Dp, n, drec, g.ldg, before, g.Dp, first ? nullptr : part, part, g.Dp);
        first = false;
        n = 0;
      }
    }
    if (!p.dinitial) return;
    for (int s = 0; s < S; ++s) {
      for (int r = 0; r < rows; ++r) {
        store_row(p.dinitial + (((b + r) * S + s) * p.H + head) * p.D, carried[s] + r * g.Dp, g.D);
      }
    }
  }

  EFFVIT_INLINE vf state_before(int64_t b, int64_t t, int s, int64_t head, int c) const {
    if (t == 0) return this->first_state(b, s, head, c);
    return load_lanes(this->state(p.trace, b, t - 1, s, head) + c, g.D - c);
  }

  void step(int64_t b, int64_t t, int64_t head, int r, float* to) {
    const T* const x = this->x(b, t, head);
    const float* const rec = this->pre + r * g.ldg;
    const T* const grad_out = static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + t * p.grad_out_stride_l +
                              head * p.grad_out_stride_h;
    T* const dx = static_cast<T*>(p.dx) + ((b * p.L + t) * p.G * p.H + head) * p.D;
    float* const bias_sum = part + int64_t{g.columns} * g.Dp;
    for (int c = 0; c < g.D; c += kLanes) {
      const int left = g.D - c;
      vf grad[S], now[S], old[S], dpre[G], drec_of[G];
      for (int s = 0; s < S; ++s) {
        grad[s] = load(carried[s] + r * g.Dp + c);
        if (p.grad_trace) grad[s] += load_lanes(this->state(const_cast<float*>(p.grad_trace), b, t, s, head) + c, left);
        now[s] = load_lanes(this->state(p.trace, b, t, s, head) + c, left);
        old[s] = state_before(b, t, s, head, c);
      }
      grad[0] += load_lanes(grad_out + c, left);
      if constexpr (kCell == RnnCell::kLstm) {
        const vf i = sigmoid(this->gate_of(x, rec, 0, c)), f = sigmoid(this->gate_of(x, rec, 1, c));
        const vf n = tanh(this->gate_of(x, rec, 2, c)), o = sigmoid(this->gate_of(x, rec, 3, c));
        const vf y = tanh(now[1]), dc = grad[1] + grad[0] * o * (1.f - y * y);
        dpre[0] = dc * n * i * (1.f - i);
        dpre[1] = dc * old[1] * f * (1.f - f);
        dpre[2] = dc * i * (1.f - n * n);
        dpre[3] = grad[0] * y * o * (1.f - o);
        store(carried[1] + r * g.Dp + c, dc * f);
        for (int gate = 0; gate < G; ++gate) drec_of[gate] = dpre[gate];
      } else if constexpr (kCell == RnnCell::kGru) {
        const vf reset = sigmoid(this->gate_of(x, rec, 0, c)), z = sigmoid(this->gate_of(x, rec, 1, c));
        const vf a = this->rec_of(rec, 2, c), n = tanh(load_lanes(x + 2 * p.x_stride_g + c, left) + reset * a);
        dpre[2] = grad[0] * (1.f - z) * (1.f - n * n);
        dpre[1] = grad[0] * (old[0] - n) * z * (1.f - z);
        dpre[0] = dpre[2] * a * reset * (1.f - reset);
        drec_of[0] = dpre[0], drec_of[1] = dpre[1], drec_of[2] = dpre[2] * reset;
        store(direct + r * g.Dp + c, first_lanes(grad[0] * z, std::min(left, kLanes)));
      } else {
        const vf i = this->gate_of(x, rec, 0, c), f = this->gate_of(x, rec, 1, c), kept = log_sigmoid(f) + old[3];
        const vf z = tanh(this->gate_of(x, rec, 2, c)), o = sigmoid(this->gate_of(x, rec, 3, c));
        const vf in = exp_below(i, now[3]), forget = exp_below(kept, now[3]);
        const vf ratio = now[1] / now[2], dy = grad[0] * o;
        const vf dc = grad[1] + dy / now[2], dn = grad[2] - dy * ratio / now[2];
        const vf din = (dc * z + dn) * in, dforget = (dc * old[1] + dn * old[2]) * forget;  // of the exponents
        const vf dm = grad[3] - din - dforget;
        const vf share = kept > i ? set1(1.f) : vf{};
        const vf dkept = dforget + dm * share;
        dpre[0] = din + dm * (1.f - share);
        dpre[1] = dkept * sigmoid(-f);
        dpre[2] = dc * in * (1.f - z * z);
        dpre[3] = grad[0] * ratio * o * (1.f - o);
        store(carried[1] + r * g.Dp + c, dc * forget);
        store(carried[2] + r * g.Dp + c, dn * forget);
        store(carried[3] + r * g.Dp + c, dkept);
        for (int gate = 0; gate < G; ++gate) drec_of[gate] = dpre[gate];
      }
      for (int gate = 0; gate < G; ++gate) {
        const vf d = first_lanes(drec_of[gate], std::min(left, kLanes));  // what lies beyond meets weights of zero
        store(to + gate * g.Dp + c, d);
        store(bias_sum + gate * g.Dp + c, load(bias_sum + gate * g.Dp + c) + d);
        store_lanes(dx + gate * p.H * p.D + c, dpre[gate], left);
      }
    }
  }
};

// Rows of the gradient of the weights, and of the bias: the sum over the units of a head.
template <class T>
void reduce(const Params& p, const Plan& g, float* workspace, int64_t begin, int64_t end) {
  float* const sum = static_cast<float*>(thread_scratch(static_cast<size_t>(g.Dp) * sizeof(float)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / p.G, gate = unit % p.G;
    for (int64_t o = 0; o <= g.D; ++o) {  // the last one is the bias
      const int64_t at = o < g.D ? (gate * g.Dp + o) * g.Dp : int64_t{g.columns} * g.Dp + gate * g.Dp;
      zero(sum, g.Dp);
      for (int64_t i = 0; i < g.parts; ++i) {
        axpy(sum, 1.f, g.part(workspace, p, head * g.parts + i) + at, g.Dp);
      }
      if (o < g.D) {
        store_row(static_cast<T*>(p.dweight) + ((head * p.G + gate) * p.D + o) * p.D, sum, g.D);
      } else if (p.dbias) {
        store_row(static_cast<T*>(p.dbias) + (gate * p.H + head) * p.D, sum, g.D);
      }
    }
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

template <class F>
EFFVIT_INLINE void dispatch_cell(RnnCell cell, const F& f) {
  switch (cell) {
    case RnnCell::kLstm:
      return f(std::integral_constant<RnnCell, RnnCell::kLstm>{});
    case RnnCell::kGru:
      return f(std::integral_constant<RnnCell, RnnCell::kGru>{});
    default:
      return f(std::integral_constant<RnnCell, RnnCell::kSlstm>{});
  }
}

int64_t weight_units(const Params& p) { return p.H * p.G; }

void prepare_weights(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) { prepare<decltype(type)>(p, g, workspace, begin, end); });
}

int64_t forward_units(const Params& p) { return p.H * Plan(p).blocks; }

void forward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_cell(p.cell, [&](auto cell) {
      run_pass<Forward<decltype(type), decltype(cell)::value>>(p, g, workspace, begin, end);
    });
  });
}

int64_t backward_units(const Params& p) { return p.H * Plan(p).parts; }

void backward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_cell(p.cell, [&](auto cell) {
      run_pass<Backward<decltype(type), decltype(cell)::value>>(p, g, workspace, begin, end);
    });
  });
}

void reduce_parts(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) { reduce<decltype(type)>(p, g, workspace, begin, end); });
}

int64_t forward_floats(const Params& p) { return p.H * Plan(p).head_floats; }

int64_t backward_floats(const Params& p) {
  const Plan g(p);
  return p.H * g.head_floats + p.H * g.parts * g.part_floats;
}

constexpr Step<Params> kForward[] = {{weight_units, prepare_weights}, {forward_units, forward}};
constexpr Step<Params> kBackward[] = {
    {weight_units, prepare_weights}, {backward_units, backward}, {weight_units, reduce_parts}};

}  // namespace rnn_scan_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<RnnScanParams>* EFFVIT_KERNEL_NAME(rnn_scan)() {
  namespace impl = EFFVIT_ISA_NAME::rnn_scan_impl;
  static constexpr Kernel<RnnScanParams> kernel = {routine(impl::kForward, impl::forward_floats),
                                                   routine(impl::kBackward, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
