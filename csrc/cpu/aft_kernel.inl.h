// aft on the CPU: forward and backward, on raw pointers, compiled once per ISA.
//
// exp(k_jc + w_ij) is a product of exp(k_jc - a_c) and exp(w_ij - b_i), a and b the largest of each, so sums over
// keys are matrix products, of the weights of a block of rows and a tile of keys with [exp(k), exp(k) v]. Where the
// product leaves less than kLeast of a sum, which is at least 1 when k and w have their largest at one key, rounding
// and underflow may have taken the rest: vectors of channels that hold such an element are computed term by term.
// Backward: P_ijc = exp(k_jc - a_c) exp(w_ij - b_i) f_ic with f = exp(a_c + b_i - lse_ic), a and b of a tile of keys.
//   dv_jc = sum_i P gy, dk_jc = v dv - sum_i P (gy mean - glse), dw_ij = sum_bc P (gy (v - mean) + glse), where gy is
// the gradient of the mean. Elements with f beyond 1 / kLeast go term by term.
// Without a bias nothing depends on the query but the gate: aft_simple.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace aft_impl {

using Params = AftParams;

constexpr float kLow = -1e30f;  // stands in for -infinity where two are subtracted
constexpr float kLeast = 0x1p-60f, kMostExponent = 41.f;  // e^41 < 2^60
constexpr float kLargeLse = 8.f;  // from there on its rounding is more than two of a weight's own

struct Plan {
  int rows, keys = 128, channels = 128;  // of a block, a tile and a chunk; rows and channels are whole vectors
  int ldw, ldx;  // row strides of weights, and of pairs of channels
  int C;

  explicit Plan(const Params& p) : C(static_cast<int>(p.C)) {
    // Large blocks, as each computes the exponentials of all keys; small ones where there are few.
    const int64_t blocks = std::max(ceil_div(p.L, 192), std::min(ceil_div(8, p.B), ceil_div(p.L, 48)));
    rows = round_up(static_cast<int>(ceil_div(p.L, blocks)), 16);
    if (small_tiles()) rows = 16, keys = 16, channels = 16;
    channels = std::min(channels, round_up(C, kLanes));
    keys = static_cast<int>(std::min<int64_t>(keys, p.M));
    ldw = round_up(keys, kLanes) + 16;
    ldx = 2 * channels + 16;
  }
  int width(int chunk) const { return std::min(channels, C - chunk); }
};

EFFVIT_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exp_full(-x)); }

// sigmoid(x) (1 - sigmoid(x))
EFFVIT_INLINE vf sigmoid_slope(vf x) {
  const vf e = exp(min(x, -x)), d = 1.f + e;
  return e / (d * d);
}

template <class T>
EFFVIT_INLINE const T* row_of(const void* base, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l) {
  return static_cast<const T*>(base) + b * stride_b + l * stride_l;
}

// A sum of two, and what rounding took off: keys and biases in the hundreds may cancel.
struct ExactSum {
  vf high, low;
  EFFVIT_INLINE ExactSum(vf a, vf b) : high(a + b) {
    const vf part = high - a;
    low = (a - (high - part)) + (b - part);
  }
};

EFFVIT_INLINE vf abs(vf x) { return max(x, -x); }

EFFVIT_INLINE vf load_or_zero(const float* p, int left) { return p ? load_lanes(p, left) : vf{}; }

// w of query i and keys [key, key + n), kLow up to whole vectors.
void load_weights(float* to, const Params& p, int64_t i, int64_t key, int n) {
  const int64_t offset = i * p.bias_stride_l + key * p.bias_stride_m;
  if (p.bias_stride_m == 1) {
    dispatch_dtype(p.bias_dtype,
                   [&](auto type) { load_row(to, static_cast<const decltype(type)*>(p.bias) + offset, n); });
  } else {
    for (int j = 0; j < n; ++j) to[j] = load_scalar(p.bias, p.bias_dtype, offset + j * p.bias_stride_m);
  }
  if (p.window) {
    const int64_t first = std::clamp<int64_t>(i - p.window + 1 - key, 0, n), last = i + p.window - key;
    for (int64_t j = 0; j < first; ++j) to[j] = 0.f;
    for (int64_t j = std::max<int64_t>(last, 0); j < n; ++j) to[j] = 0.f;
  }
  for (int j = n; j < round_up(n, kLanes); ++j) to[j] = kLow;
}

EFFVIT_INLINE float largest(const float* x, int n, float at_least) {  // n a multiple of kLanes
  vf m = set1(at_least);
  for (int j = 0; j < n; j += kLanes) m = max(m, load(x + j));
  return reduce_max(m);
}

// x = exp(x - top)
EFFVIT_INLINE void exp_row(float* x, int n, float top) {
  for (int j = 0; j < n; j += kLanes) store(x + j, exp(load(x + j) - top));
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  const Params& p;
  const Plan& g;
  float *w, *w_top, *k_top, *x, *acc;

  Forward(const Params& params, const Plan& plan, Scratch& s) : p(params), g(plan) {
    w = s.take<float>(int64_t{g.rows} * g.ldw);
    w_top = s.take<float>(g.rows);
    k_top = s.take<float>(g.channels);
    x = s.take<float>(int64_t{g.keys} * g.ldx);
    acc = s.take<float>(int64_t{g.rows} * g.ldx);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t blocks = ceil_div(p.L, g.rows);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / blocks, row = unit % blocks * g.rows;
      block(b, row, static_cast<int>(std::min<int64_t>(g.rows, p.L - row)));
    }
  }

  void block(int64_t b, int64_t row, int rows) {
    for (int i = 0; i < rows; ++i) {
      w_top[i] = kLow;
      for (int64_t key = 0; key < p.M; key += g.keys) {
        const int keys = static_cast<int>(std::min<int64_t>(g.keys, p.M - key));
        load_weights(w, p, row + i, key, keys);
        w_top[i] = largest(w, round_up(keys, kLanes), w_top[i]);
      }
    }
    for (int chunk = 0; chunk < g.C; chunk += g.channels) {
      const int width = g.width(chunk), padded = round_up(width, kLanes);
      find_k_top(b, chunk, width);
      for (int64_t key = 0; key < p.M; key += g.keys) {
        const int keys = static_cast<int>(std::min<int64_t>(g.keys, p.M - key)), w_width = round_up(keys, kLanes);
        for (int i = 0; i < rows; ++i) {
          load_weights(w + i * g.ldw, p, row + i, key, keys);
          exp_row(w + i * g.ldw, w_width, w_top[i]);
        }
        for (int j = 0; j < keys; ++j) {
          const T* const kj = row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, key + j) + chunk;
          const T* const vj = row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, key + j) + chunk;
          float* const to = x + j * g.ldx;
          for (int c = 0; c < padded; c += kLanes) {
            const vf e = exp(load_lanes(kj + c, width - c) - load(k_top + c));
            store(to + c, e);
            store(to + padded + c, e * load_lanes(vj + c, width - c));
          }
        }
        gemm(rows, 2 * padded, keys, w, g.ldw, x, g.ldx, key == 0 ? nullptr : acc, acc, g.ldx);
      }
      for (int i = 0; i < rows; ++i) finish(b, row + i, w_top[i], acc + i * g.ldx, chunk, width, padded);
    }
  }

  void find_k_top(int64_t b, int chunk, int width) {
    for (int c = 0; c < width; c += kLanes) {
      vf m = set1(kLow);
      const T* from = row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, 0) + chunk + c;
      for (int64_t j = 0; j < p.M; ++j, from += p.k_stride_l) m = max(m, load_lanes(from, width - c));
      store(k_top + c, m);
    }
  }

  void finish(int64_t b, int64_t i, float top, const float* sums, int chunk, int width, int padded) {
    const int64_t at = (b * p.L + i) * p.C + chunk;
    const T* const qi = row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, i) + chunk;
    for (int c = 0; c < width; c += kLanes) {
      const int left = width - c;
      const vf den = load(sums + c);
      const ExactSum both(load(k_top + c), set1(top));
      vf mean = load(sums + padded + c) / den, lse = both.high + (log(den) + both.low);
      const vi fine = den >= set1(kLeast);
      if (any(~fine & lanes_below(std::min(left, kLanes)))) term_by_term(b, i, chunk + c, left, mean, lse);
      store_lanes(p.mean + at + c, mean, left);
      store_lanes(p.lse + at + c, lse, left);
      store_lanes(static_cast<T*>(p.out) + at + c, sigmoid(load_lanes(qi + c, left)) * mean, left);
    }
  }

  static EFFVIT_INLINE bool any(vi x) {
    for (int i = 0; i < kLanes; ++i) {
      if (x[i]) return true;
    }
    return false;
  }

  __attribute__((noinline)) void term_by_term(int64_t b, int64_t i, int c, int left, vf& mean, vf& lse) {
    vf top = set1(-INFINITY), den{}, num{};
    for (const bool sum : {false, true}) {
      for (int64_t key = 0; key < p.M; key += g.keys) {
        const int keys = static_cast<int>(std::min<int64_t>(g.keys, p.M - key));
        load_weights(x, p, i, key, keys);  // x is not in use any more
        for (int j = 0; j < keys; ++j) {
          const vf kj = load_lanes(row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, key + j) + c, left);
          const ExactSum e(kj, set1(x[j]));
          if (sum) {
            vf y = exp(e.high - top);
            y = y > vf{} ? fma(y, e.low, y) : y;  // an infinity less itself
            den += y;
            num += y * load_lanes(row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, key + j) + c, left);
          } else {
            top = max(top, e.high);
          }
        }
      }
    }
    mean = num / den;
    lse = den == den ? top + log(den) : den;
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// What backward shares: the parts of P of a tile of keys and a chunk of channels, and of a block of rows.
template <class T>
struct Terms {
  const Params& p;
  const Plan& g;
  float *w, *w_top, *k, *v, *k_top, *ab;
  bool* term_by_term;  // [rows, channels / kLanes]: that vector of channels has elements which go term by term

  Terms(const Params& params, const Plan& plan, Scratch& s) : p(params), g(plan) {
    w = s.take<float>(int64_t{g.rows} * g.ldw);
    w_top = s.take<float>(g.rows);
    k = s.take<float>(int64_t{g.keys} * g.channels);
    v = s.take<float>(int64_t{g.keys} * g.channels);
    k_top = s.take<float>(g.channels);
    ab = s.take<float>(int64_t{g.rows} * g.ldx);
    term_by_term = s.take<bool>(int64_t{g.rows} * g.channels / kLanes);
  }

  void load_keys(int64_t b, int64_t key, int keys, int chunk) {
    const int width = g.width(chunk), padded = round_up(width, kLanes);
    load_tokens(k, g.channels, keys, width,
                [&](int j) { return row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, key + j) + chunk; });
    load_tokens(v, g.channels, keys, width,
                [&](int j) { return row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, key + j) + chunk; });
    for (int c = 0; c < padded; c += kLanes) {
      vf m = set1(kLow);
      for (int j = 0; j < keys; ++j) m = max(m, load(k + j * g.channels + c));
      store(k_top + c, m);
    }
  }
  EFFVIT_INLINE vf exp_k(int j, int c) const { return exp(load(k + j * g.channels + c) - load(k_top + c)); }

  void load_block_weights(int64_t row, int rows, int64_t key, int keys) {
    const int padded = round_up(keys, kLanes);
    for (int i = 0; i < rows; ++i) {
      float* const to = w + i * g.ldw;
      load_weights(to, p, row + i, key, keys);
      w_top[i] = largest(to, padded, kLow);
      exp_row(to, padded, w_top[i]);
    }
  }

  // k + w - lse
  static EFFVIT_INLINE ExactSum exponent(vf k, float w, vf lse) {
    const ExactSum both(k, set1(w));
    ExactSum x(both.high, -lse);
    x.low += both.low;
    return x;
  }

  // Rows i of ab: gy f and (gy mean - glse) f of a chunk. Returns whether any vector goes term by term.
  bool load_gradients(int64_t b, int64_t row, int rows, int chunk) {
    const int width = g.width(chunk), padded = round_up(width, kLanes);
    bool found = false;
    for (int i = 0; i < rows; ++i) {
      float* const to = ab + i * g.ldx;
      for (int c = 0; c < padded; c += kLanes) {
        vf gy, gm, lse;
        gradient(b, row + i, chunk + c, width - c, gy, gm, lse);
        const ExactSum x = exponent(load(k_top + c), w_top[i], lse);
        const vi fine = x.high <= set1(kMostExponent);
        vf f = exp((vf)(((vi)x.high & fine) | ((vi)set1(-100.f) & ~fine)));
        f = fma(f, (vf)((vi)x.low & fine), f);
        store(to + c, gy * f);
        store(to + padded + c, gm * f);
        const bool other = any(~fine & lanes_below(std::min(width - c, kLanes)));
        term_by_term[i * (g.channels / kLanes) + c / kLanes] = other;
        found |= other;
      }
    }
    return found;
  }

  // Of an element: gy, gy mean - glse, lse; zeros beyond the channels.
  EFFVIT_INLINE void gradient(int64_t b, int64_t i, int c, int left, vf& gy, vf& gm, vf& lse) const {
    const int64_t at = (b * p.L + i) * p.C + c;
    const vf q = load_lanes(row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, i) + c, left);
    const vf grad = load_lanes(row_of<T>(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, b, i) + c, left);
    gy = grad * sigmoid(q) + load_or_zero(p.grad_mean ? p.grad_mean + at : nullptr, left);
    gm = gy * load_lanes(p.mean + at, left) - load_or_zero(p.grad_lse ? p.grad_lse + at : nullptr, left);
    lse = load_lanes(p.lse + at, left);
  }

  static EFFVIT_INLINE bool any(vi x) {
    for (int i = 0; i < kLanes; ++i) {
      if (x[i]) return true;
    }
    return false;
  }

  // Calls f(i, j, c, P, gy, gm) for all pairs of a block and a tile, and those vectors; P is 0 elsewhere in these.
  template <class F>
  void each_term(int64_t b, int64_t row, int rows, int64_t key, int keys, int chunk, const F& f) {
    const int width = g.width(chunk);
    for (int i = 0; i < rows; ++i) {
      bool loaded = false;
      for (int c = 0; c < width; c += kLanes) {
        if (!term_by_term[i * (g.channels / kLanes) + c / kLanes]) continue;
        if (!loaded) load_weights(w + i * g.ldw, p, row + i, key, keys);  // over their exponentials
        loaded = true;
        vf gy, gm, lse;
        gradient(b, row + i, chunk + c, width - c, gy, gm, lse);
        const vi fine = exponent(load(k_top + c), w_top[i], lse).high <= set1(kMostExponent);
        const vi here = ~fine & lanes_below(std::min(width - c, kLanes));
        for (int j = 0; j < keys; ++j) {
          const ExactSum x = exponent(load(k + j * g.channels + c), w[i * g.ldw + j], lse);
          vf weight = exp_full(x.high);
          weight = weight > vf{} ? fma(weight, x.low, weight) : weight;  // a pair that does not count has no low part
          f(i, j, c, (vf)((vi)weight & here), gy, gm);
        }
      }
      if (loaded) exp_row(w + i * g.ldw, round_up(keys, kLanes), w_top[i]);
    }
  }
};

// dk and dv of a tile of keys.
template <class T>
struct BackwardKeys : Terms<T> {
  using Terms<T>::p;
  using Terms<T>::g;
  float *acc, *rest;

  BackwardKeys(const Params& params, const Plan& plan, Scratch& s) : Terms<T>(params, plan, s) {
    acc = s.take<float>(int64_t{g.keys} * g.ldx);
    rest = s.take<float>(int64_t{g.keys} * g.ldx);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t tiles = ceil_div(p.M, g.keys);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / tiles, key = unit % tiles * g.keys;
      const int keys = static_cast<int>(std::min<int64_t>(g.keys, p.M - key));
      for (int chunk = 0; chunk < g.C; chunk += g.channels) tile(b, key, keys, chunk);
    }
  }

  void tile(int64_t b, int64_t key, int keys, int chunk) {
    const int width = g.width(chunk), padded = round_up(width, kLanes);
    this->load_keys(b, key, keys, chunk);
    bool any_rest = false;
    for (int64_t row = 0; row < p.L; row += g.rows) {
      const int rows = static_cast<int>(std::min<int64_t>(g.rows, p.L - row));
      this->load_block_weights(row, rows, key, keys);
      const bool found = this->load_gradients(b, row, rows, chunk);
      gemm_transposed(keys, 2 * padded, rows, this->w, g.ldw, this->ab, g.ldx, row == 0 ? nullptr : acc, acc, g.ldx);
      if (!found) continue;
      if (!any_rest) zero(rest, int64_t{g.keys} * g.ldx);
      any_rest = true;
      this->each_term(b, row, rows, key, keys, chunk, [&](int, int j, int c, vf weight, vf gy, vf gm) {
        float* const to = rest + j * g.ldx + c;
        store(to, fma(weight, gy, load(to)));
        store(to + padded, fma(weight, gm, load(to + padded)));
      });
    }
    for (int j = 0; j < keys; ++j) {
      const int64_t at = (b * p.M + key + j) * p.C + chunk;
      for (int c = 0; c < width; c += kLanes) {
        const vf e = this->exp_k(j, c);
        vf dv = e * load(acc + j * g.ldx + c), moved = e * load(acc + j * g.ldx + padded + c);
        if (any_rest) dv += load(rest + j * g.ldx + c), moved += load(rest + j * g.ldx + padded + c);
        store_lanes(static_cast<T*>(p.dv) + at + c, dv, width - c);
        store_lanes(static_cast<T*>(p.dk) + at + c, load(this->v + j * g.channels + c) * dv - moved, width - c);
      }
    }
  }
};

// The gradient of the bias of a block of rows, a tile of keys at a time; sums over batch and channels.
template <class T>
struct BackwardBias : Terms<T> {
  using Terms<T>::p;
  using Terms<T>::g;
  float *x, *abt, *acc, *rest;

  BackwardBias(const Params& params, const Plan& plan, Scratch& s) : Terms<T>(params, plan, s) {
    x = s.take<float>(int64_t{g.keys} * g.ldx);
    abt = s.take<float>(2 * int64_t{g.channels} * g.rows);
    acc = s.take<float>(int64_t{g.keys} * g.rows);
    rest = s.take<float>(int64_t{g.keys} * g.rows);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit * g.rows;
      const int rows = static_cast<int>(std::min<int64_t>(g.rows, p.L - row));
      for (int64_t key = 0; key < p.M; key += g.keys) {
        tile(row, rows, key, static_cast<int>(std::min<int64_t>(g.keys, p.M - key)));
      }
    }
  }

  void tile(int64_t row, int rows, int64_t key, int keys) {
    const int across = round_up(rows, kLanes);
    bool first = true, any_rest = false;
    this->load_block_weights(row, rows, key, keys);
    for (int64_t b = 0; b < p.B; ++b) {
      for (int chunk = 0; chunk < g.C; chunk += g.channels) {
        const int width = g.width(chunk), padded = round_up(width, kLanes);
        this->load_keys(b, key, keys, chunk);
        for (int j = 0; j < keys; ++j) {  // exp(k) v and -exp(k)
          for (int c = 0; c < padded; c += kLanes) {
            const vf e = this->exp_k(j, c);
            store(x + j * g.ldx + c, e * load(this->v + j * g.channels + c));
            store(x + j * g.ldx + padded + c, -e);
          }
        }
        const bool found = this->load_gradients(b, row, rows, chunk);
        transpose_rows(abt, g.rows, rows, 2 * padded, [&](int i) { return this->ab + i * g.ldx; });
        gemm(keys, across, 2 * padded, x, g.ldx, abt, g.rows, first ? nullptr : acc, acc, g.rows);
        first = false;
        if (!found) continue;
        if (!any_rest) zero(rest, int64_t{g.keys} * g.rows);
        any_rest = true;
        this->each_term(b, row, rows, key, keys, chunk, [&](int i, int j, int c, vf weight, vf gy, vf gm) {
          rest[j * g.rows + i] += reduce_add(weight * (gy * load(this->v + j * g.channels + c) - gm));
        });
      }
    }
    dispatch_dtype(p.bias_dtype, [&](auto type) {
      using U = decltype(type);
      for (int i = 0; i < rows; ++i) {
        U* const to = static_cast<U*>(p.dbias) + (row + i) * p.M + key;
        for (int j = 0; j < keys; ++j) {
          const int64_t distance = row + i - (key + j);
          float sum = this->w[i * g.ldw + j] * acc[j * g.rows + i];
          if (any_rest) sum += rest[j * g.rows + i];
          const bool near = p.window == 0 || (distance < p.window && -distance < p.window);
          to[j] = from_float<U>(near ? sum : 0.f);
        }
      }
    });
  }
};

template <class T>
void gradient_of_q(const Params& p, int64_t begin, int64_t end) {  // rows of all batch items
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.L, i = row % p.L;
    const T* const q = row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, i);
    const T* const grad = row_of<T>(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, b, i);
    const float* const mean = p.mean + (p.bias ? row : b) * p.C;
    T* const to = static_cast<T*>(p.dq) + row * p.C;
    for (int64_t c = 0; c < p.C; c += kLanes) {
      const int left = static_cast<int>(std::min<int64_t>(kLanes, p.C - c));
      const vf slope = sigmoid_slope(load_lanes(q + c, left));
      store_lanes(to + c, load_lanes(grad + c, left) * load_lanes(mean + c, left) * slope, left);
    }
  }
}

// ---- without a bias ------------------------------------------------------------------------------------------------

// A vector of channels of a batch item.
template <class T>
void simple_forward(const Params& p, int64_t b, int64_t c, int left) {
  const T* const k = row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, 0) + c;
  const T* const v = row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, 0) + c;
  vf top = set1(-INFINITY), den{}, num{};
  for (int64_t j = 0; j < p.M; ++j) top = max(top, load_lanes(k + j * p.k_stride_l, left));
  for (int64_t j = 0; j < p.M; ++j) {
    const vf e = exp(load_lanes(k + j * p.k_stride_l, left) - top);
    den += e;
    num += e * load_lanes(v + j * p.v_stride_l, left);
  }
  const vf mean = num / den;
  store_lanes(p.mean + b * p.C + c, mean, left);
  store_lanes(p.lse + b * p.C + c, den == den ? top + log(den) : den, left);
  for (int64_t i = 0; i < p.L; ++i) {
    const T* const q = row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, i) + c;
    store_lanes(static_cast<T*>(p.out) + (b * p.L + i) * p.C + c, sigmoid(load_lanes(q, left)) * mean, left);
  }
}

template <class T>
void simple_backward(const Params& p, int64_t b, int64_t c, int left) {
  vf gy = load_or_zero(p.grad_mean ? p.grad_mean + b * p.C + c : nullptr, left);
  for (int64_t i = 0; i < p.L; ++i) {
    const vf q = load_lanes(row_of<T>(p.q, p.q_stride_b, p.q_stride_l, b, i) + c, left);
    gy += sigmoid(q) * load_lanes(row_of<T>(p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, b, i) + c, left);
  }
  const vf mean = load_lanes(p.mean + b * p.C + c, left), lse = load_lanes(p.lse + b * p.C + c, left);
  vf glse = load_or_zero(p.grad_lse ? p.grad_lse + b * p.C + c : nullptr, left);
  const vi large = abs(lse) > set1(kLargeLse);
  if (Terms<T>::any(large)) {  // its rounding is in the sum of the weights
    vf sum{};
    for (int64_t j = 0; j < p.M; ++j) {
      sum += exp(load_lanes(row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, j) + c, left) - lse);
    }
    const vf scale = large ? 1.f / sum : set1(1.f);
    gy *= scale, glse *= scale;
  }
  for (int64_t j = 0; j < p.M; ++j) {
    const vf k = load_lanes(row_of<T>(p.k, p.k_stride_b, p.k_stride_l, b, j) + c, left);
    const vf v = load_lanes(row_of<T>(p.v, p.v_stride_b, p.v_stride_l, b, j) + c, left);
    const vf weight = exp(k - lse);
    const int64_t at = (b * p.M + j) * p.C + c;
    store_lanes(static_cast<T*>(p.dv) + at, weight * gy, left);
    store_lanes(static_cast<T*>(p.dk) + at, weight * fma(gy, v - mean, glse), left);
  }
}

template <class F>
void simple_units_of(const Params& p, int64_t begin, int64_t end, const F& f) {
  const int64_t vectors = ceil_div(p.C, kLanes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit % vectors * kLanes;
    f(unit / vectors, c, static_cast<int>(std::min<int64_t>(kLanes, p.C - c)));
  }
}

int64_t simple_units(const Params& p) { return p.B * ceil_div(p.C, kLanes); }

// ---- entry points --------------------------------------------------------------------------------------------------

int64_t forward_units(const Params& p) { return p.bias ? p.B * ceil_div(p.L, Plan(p).rows) : simple_units(p); }

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.bias) return run_pass<Forward<T>>(p, g, begin, end);
    simple_units_of(p, begin, end, [&](int64_t b, int64_t c, int left) { simple_forward<T>(p, b, c, left); });
  });
}

int64_t q_units(const Params& p) { return p.B * p.L; }

void backward_q(const Params& p, float*, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { gradient_of_q<decltype(type)>(p, begin, end); });
}

int64_t key_units(const Params& p) { return p.bias ? p.B * ceil_div(p.M, Plan(p).keys) : simple_units(p); }

void backward_keys(const Params& p, float*, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.bias) return run_pass<BackwardKeys<T>>(p, g, begin, end);
    simple_units_of(p, begin, end, [&](int64_t b, int64_t c, int left) { simple_backward<T>(p, b, c, left); });
  });
}

int64_t bias_units(const Params& p) { return p.bias ? ceil_div(p.L, Plan(p).rows) : 0; }

void backward_bias(const Params& p, float*, int64_t begin, int64_t end) {
  const Plan g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<BackwardBias<decltype(type)>>(p, g, begin, end); });
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{q_units, backward_q}, {key_units, backward_keys}, {bias_units, backward_bias}};

}  // namespace aft_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<AftParams>* EFFVIT_KERNEL_NAME(aft)() {
  namespace impl = EFFVIT_ISA_NAME::aft_impl;
  static constexpr Kernel<AftParams> kernel = {routine(impl::kForward), routine(impl::kBackward)};
  return &kernel;
}
}  // namespace effvit::cpu
