// Times the bare window_attention CPU kernels, without torch and Python, on every instruction set of this machine.
//
//   bench_window_attention [--threads N] [--seconds S] [--isa NAME] [--filter TEXT]
//
// Every instruction set's result is first compared with the generic one's. Swin-T stages, batch 8, packed qkv.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "common/window_attention_params.h"
#include "cpu/kernel.h"
#include "micro.h"

extern "C" int effvit_cpu_set_isa(const char* name);
extern "C" const char* effvit_cpu_available_isas();

namespace {

using effvit::DType;
using effvit::WindowAttentionParams;
using effvit::bench::Buffer;
using effvit::bench::repeat_parallel;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Problem {
  Problem(int64_t size, int64_t heads, int32_t shift, DType dtype)
      : qkv(8 * size * size * heads * 96, dtype),
        table(heads * 169, DType::kFloat32),
        out(8 * size * size * heads * 32, dtype),
        lse(8 * size * size * heads, DType::kFloat32),
        grad_out(out.count, dtype),
        dqkv(qkv.count, dtype),
        dtable(table.count, DType::kFloat32) {
    qkv.fill_normal(1);
    table.fill_normal(2);
    grad_out.fill_normal(3);
    p.B = 8, p.H = p.W = size, p.h = heads, p.d = p.dv = 32;
    const int64_t width = heads * 32, item = dtype == DType::kFloat32 ? 4 : 2;
    char* const base = static_cast<char*>(qkv.data);
    p.q = base, p.k = base + width * item, p.v = base + 2 * width * item;
    p.q_stride_h = p.k_stride_h = p.v_stride_h = p.grad_out_stride_h = 32;
    p.q_stride_x = p.k_stride_x = p.v_stride_x = 3 * width;
    p.q_stride_y = p.k_stride_y = p.v_stride_y = 3 * width * size;
    p.q_stride_b = p.k_stride_b = p.v_stride_b = 3 * width * size * size;
    p.grad_out_stride_x = width, p.grad_out_stride_y = width * size, p.grad_out_stride_b = width * size * size;
    p.bias_table = table.data;
    p.bias_stride_h = 169, p.bias_stride_y = 13, p.bias_stride_x = 1;
    p.out = out.data, p.lse = static_cast<float*>(lse.data);
    p.grad_out = grad_out.data, p.dbias_table = dtable.data;
    char* const grads = static_cast<char*>(dqkv.data);
    p.dq = grads, p.dk = grads + width * item, p.dvalue = grads + 2 * width * item;
    p.dq_stride_t = p.dk_stride_t = p.dvalue_stride_t = 3 * width;
    p.window_h = p.window_w = 7;
    p.shift_h = p.shift_w = shift;
    p.scale = 1.f / std::sqrt(32.f);
    p.dtype = dtype;
  }

  void run(bool backward, int threads, int repeats) {
    const auto& kernel = *effvit::cpu::kernel<WindowAttentionParams>();
    const auto& routine = backward ? kernel.backward : kernel.forward;
    workspace.resize(std::max<int64_t>(routine.floats(p), 1));
    for (const auto& step : routine) {  // a step at a time, each as often as asked for
      repeat_parallel(threads, step.units(p), repeats,
                      [&](int64_t begin, int64_t end) { step.run(p, workspace.data(), begin, end); });
    }
  }

  WindowAttentionParams p;
  Buffer qkv, table, out, lse, grad_out, dqkv, dtable;
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
    int64_t size, heads;
  } stages[] = {{56, 3}, {28, 6}, {14, 12}, {7, 24}};
  int wrong = 0;
  std::printf("%-16s %-30s %10s %10s %10s %10s\n", "isa", "case", "ms", "GB/s", "GFLOP/s", "difference");
  for (const auto& stage : stages) {
    for (const int32_t shift : {0, 3}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        const bool wide = dtype == DType::kFloat32;
        Problem problem(stage.size, stage.heads, shift, dtype);
        for (const bool backward : {false, true}) {
          char name[64];
          std::snprintf(name, sizeof name, "%ldx%ld h%ld shift %d %s %s", long(stage.size), long(stage.size),
                        long(stage.heads), shift, wide ? "float32" : "bfloat16", backward ? "backward" : "forward");
          if (std::string(name).find(filter) == std::string::npos) continue;
          effvit_cpu_set_isa("generic");
          problem.run(false, threads, 1);  // backward reads out and lse
          if (backward) problem.run(true, threads, 1);
          const Buffer& result = backward ? problem.dqkv : problem.out;
          const std::vector<float> expected = result.values();
          const std::vector<float> expected_table = problem.dtable.values();
          for (const std::string& isa : split(effvit_cpu_available_isas())) {
            if ((!only.empty() && isa != only) || effvit_cpu_set_isa(isa.c_str()) != 0) continue;
            (backward ? problem.dqkv : problem.out).poison();
            if (backward) problem.dtable.poison();
            problem.run(backward, threads, 1);
            double difference = relative_difference(result.values(), expected);
            if (backward)
              difference = std::max(difference, relative_difference(problem.dtable.values(), expected_table));
            const bool ok = difference <= (wide ? 1e-5 : 2e-2);  // NaN fails
            wrong += !ok;
            const double start = now();
            problem.run(backward, threads, 1);
            const int repeats = std::max(1, static_cast<int>(seconds / 5 / std::max(now() - start, 1e-6)));
            std::vector<double> times;
            for (int burst = 0; burst < 5; ++burst) {
              const double begin = now();
              problem.run(backward, threads, repeats);
              times.push_back((now() - begin) / repeats);
            }
            std::sort(times.begin(), times.end());
            const double median = times[2], rows = double(problem.lse.count);
            const double flops = rows * 2 * 49 * 32 * (backward ? 5 : 2);
            const double bytes = rows * 32 * (wide ? 4 : 2) * (backward ? 8 : 4) + 4 * rows;
            std::printf("%-16s %-30s %10.4f %10.2f %10.2f %10.1e%s\n", isa.c_str(), name, 1e3 * median,
                        bytes / median / 1e9, flops / median / 1e9, difference, ok ? "" : "  WRONG");
          }
        }
      }
    }
  }
  if (wrong) std::printf("%d results differ from the generic kernel's\n", wrong);
  return wrong != 0;
}
