// Times the bare linear_attention CPU kernels, without torch and Python, on every instruction set of this machine.
//
//   bench_linear_attention [--threads N] [--seconds S] [--isa NAME] [--filter TEXT]
//
// Every instruction set's result is first compared with the generic one's. Packed qkv, relu, normalised by the sum.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sstream>
#include <string>
#include <vector>

#include "common/linear_attention_params.h"
#include "cpu/kernel.h"
#include "micro.h"

extern "C" int effvit_cpu_set_isa(const char* name);
extern "C" const char* effvit_cpu_available_isas();

namespace {

using effvit::DType;
using effvit::LinearAttentionParams;
using effvit::bench::Buffer;
using effvit::bench::repeat_parallel;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// What a run took: with one thread its CPU time, which other processes disturb less.
double stamp(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Problem {
  Problem(int64_t batch, int64_t tokens, int64_t heads, int64_t dim, DType dtype)
      : qkv(batch * tokens * heads * dim * 3, dtype),
        out(batch * tokens * heads * dim, dtype),
        grad_out(out.count, dtype),
        dqkv(qkv.count, dtype),
        state(batch * heads * dim * dim, DType::kFloat32),
        z(batch * heads * dim, DType::kFloat32) {
    qkv.fill_normal(1);
    grad_out.fill_normal(2);
    p.B = p.N = batch, p.L = p.M = tokens, p.H = heads, p.K = p.V = dim;
    const int64_t width = heads * dim, item = dtype == DType::kFloat32 ? 4 : 2;
    char* const base = static_cast<char*>(qkv.data);
    p.q = base, p.k = base + width * item, p.v = base + 2 * width * item;
    p.q_stride_h = p.k_stride_h = p.v_stride_h = p.grad_out_stride_h = dim;
    p.q_stride_l = p.k_stride_l = p.v_stride_l = 3 * width;
    p.q_stride_b = p.k_stride_b = p.v_stride_b = 3 * width * tokens;
    p.grad_out_stride_l = width, p.grad_out_stride_b = width * tokens;
    p.out = out.data, p.grad_out = grad_out.data;
    p.state = static_cast<float*>(state.data), p.z = static_cast<float*>(z.data);
    char* const grads = static_cast<char*>(dqkv.data);
    p.dq = grads, p.dk = grads + out.bytes(), p.dv = grads + 2 * out.bytes();
    p.dtype = dtype;
  }

  void run(bool backward, int threads) {
    const auto& kernel = *effvit::cpu::kernel<LinearAttentionParams>();
    const auto& routine = backward ? kernel.backward : kernel.forward;
    workspace.resize(std::max<int64_t>(routine.floats(p), 1));
    for (const auto& step : routine) {
      const int64_t units = step.units(p);
      if (units == 0) continue;
      repeat_parallel(threads, units, 1,
                      [&](int64_t begin, int64_t end) { step.run(p, workspace.data(), begin, end); });
    }
  }

  LinearAttentionParams p;
  Buffer qkv, out, grad_out, dqkv, state, z;
  std::vector<float> workspace;
};

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> names;
  std::stringstream stream(text);
  for (std::string name; std::getline(stream, name, ',');) names.push_back(name);
  return names;
}

const char* option(int argc, char** argv, const char* name, const char* otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return argv[i + 1];
  }
  return otherwise;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = std::max(1, std::atoi(option(argc, argv, "--threads", "1")));
  const double seconds = std::atof(option(argc, argv, "--seconds", "0.3"));
  const std::string only = option(argc, argv, "--isa", ""), filter = option(argc, argv, "--filter", "");
  const struct {
    int64_t batch, tokens, heads, dim;
  } cases[] = {{1, 196, 12, 32},  {8, 196, 12, 32},  {1, 784, 6, 64},
               {1, 3136, 12, 32}, {1, 3136, 12, 64}, {1, 12544, 6, 32}};
  int wrong = 0;
  std::printf("%-16s %-44s %10s %10s %10s %10s %10s\n", "isa", "case", "median ms", "min ms", "GB/s", "GFLOP/s",
              "difference");
  for (const auto& c : cases) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      const bool wide = dtype == DType::kFloat32;
      Problem problem(c.batch, c.tokens, c.heads, c.dim, dtype);
      for (const bool causal : {false, true}) {
        for (const bool backward : {false, true}) {
          problem.p.causal = causal;
          char name[96];
          std::snprintf(name, sizeof name, "b%ld l%ld h%ld d%ld %s%s %s", long(c.batch), long(c.tokens), long(c.heads),
                        long(c.dim), wide ? "float32" : "bfloat16", causal ? " causal" : "",
                        backward ? "backward" : "forward");
          if (std::string(name).find(filter) == std::string::npos) continue;
          effvit_cpu_set_isa("generic");
          problem.run(false, threads);  // backward reads the state
          if (backward) problem.run(true, threads);
          const Buffer& result = backward ? problem.dqkv : problem.out;
          const std::vector<float> expected = result.values();
          for (const std::string& isa : split(effvit_cpu_available_isas())) {
            if ((!only.empty() && isa != only) || effvit_cpu_set_isa(isa.c_str()) != 0) continue;
            (backward ? problem.dqkv : problem.out).poison();
            problem.run(backward, threads);
            const double difference = relative_difference(result.values(), expected);
            const bool ok = difference <= (wide ? 1e-5 : 2e-2);  // NaN fails
            wrong += !ok;
            std::vector<double> times;
            for (const double start = now(); times.size() < 5 || now() - start < seconds;) {
              const double begin = stamp(threads);
              problem.run(backward, threads);
              times.push_back(stamp(threads) - begin);
            }
            std::sort(times.begin(), times.end());
            const double median = times[times.size() / 2], elements = double(problem.out.count);
            const double flops = elements * c.dim * (backward ? 8 : 4);  // of the states, without a chunk's own scores
            const double bytes = elements * (wide ? 4 : 2) * (backward ? 7 : 4);
            std::printf("%-16s %-44s %10.4f %10.4f %10.2f %10.2f %10.1e%s\n", isa.c_str(), name, 1e3 * median,
                        1e3 * times[0], bytes / times[0] / 1e9, flops / times[0] / 1e9, difference,
                        ok ? "" : "  WRONG");
          }
        }
      }
    }
  }
  if (wrong) std::printf("%d results differ from the generic kernel's\n", wrong);
  return wrong != 0;
}
