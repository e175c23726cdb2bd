// Times the bare window_attention CUDA kernels, without torch and Python: CUDA events, cold L2. Every output is
// poisoned and must be written in full; whether the numbers are right is for the tests to say.
//
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I csrc
//   csrc/bench/bench_window_attention.cu
//   ./a.out [--calls N] [--filter TEXT] [--smoke] [--profile]
#include <cmath>
#include <type_traits>

#include "cuda/window_attention.cuh"
#include "micro.cuh"

namespace {

using namespace effvit;
using bench::Buffer;

template <class T>
void run(int64_t B, int64_t size, int64_t heads, int32_t shift, bench::Runner& runner) {
  const bool wide = std::is_same<T, float>::value;
  const int64_t rows = B * size * size * heads, width = heads * 32;
  Buffer<T> qkv(rows * 96), out(rows * 32), grad_out(rows * 32), dqkv(rows * 96);
  Buffer<float> table(heads * 169), lse(rows), dtable(heads * 169);
  qkv.fill(1), table.fill(2), grad_out.fill(3);

  WindowAttentionParams p;
  p.B = B, p.H = p.W = size, p.h = heads, p.d = p.dv = 32;
  p.q = qkv.data, p.k = qkv.data + width, p.v = qkv.data + 2 * width;
  p.q_stride_h = p.k_stride_h = p.v_stride_h = p.grad_out_stride_h = 32;
  p.q_stride_x = p.k_stride_x = p.v_stride_x = 3 * width;
  p.q_stride_y = p.k_stride_y = p.v_stride_y = 3 * width * size;
  p.q_stride_b = p.k_stride_b = p.v_stride_b = 3 * width * size * size;
  p.grad_out_stride_x = width, p.grad_out_stride_y = width * size, p.grad_out_stride_b = width * size * size;
  p.bias_table = table.data;
  p.bias_stride_h = 169, p.bias_stride_y = 13, p.bias_stride_x = 1;
  p.out = out.data, p.lse = lse.data;
  p.grad_out = grad_out.data, p.dbias_table = dtable.data;
  p.dq = dqkv.data, p.dk = dqkv.data + width, p.dvalue = dqkv.data + 2 * width;
  p.dq_stride_t = p.dk_stride_t = p.dvalue_stride_t = 3 * width;
  p.window_h = p.window_w = 7;
  p.shift_h = p.shift_w = shift;
  p.scale = 1.f / std::sqrt(32.f);
  p.dtype = wide ? DType::kFloat32 : DType::kBFloat16;
  Buffer<char> workspace(static_cast<int64_t>(window_attention_bwd_workspace_bytes(p)));

  const auto launch = [&](bool backward) {
    return backward ? launch_window_attention_bwd(p, workspace.data, runner.stream())
                    : launch_window_attention_fwd(p, runner.stream());
  };
  for (const bool backward : {false, true}) {
    char name[64];
    std::snprintf(name, sizeof name, "%ldx%ldx%ld h%ld shift %d %s %s", long(B), long(size), long(size), long(heads),
                  shift, wide ? "float32" : "bfloat16", backward ? "backward" : "forward");
    if (!runner.wanted(name)) {
      if (!backward) REQUIRE(launch(false));  // the backward pass reads its out and lse
      continue;
    }
    const double flops = double(rows) * 2 * 49 * 32 * (backward ? 5 : 2);
    const double bytes = double(rows) * 32 * sizeof(T) * (backward ? 8 : 4) + 4.0 * rows;
    runner.time(
        name, bytes, flops,
        [&] {
          if (backward)
            dqkv.poison(), dtable.poison();
          else
            out.poison(), lse.poison();
        },
        [&] { return launch(backward); },
        [&] { return backward ? dqkv.unwritten() + dtable.unwritten() : out.unwritten() + lse.unwritten(); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options = bench::parse(argc, argv);
  bench::Runner runner(options);
  const struct {
    int64_t size, heads;
  } stages[] = {{56, 3}, {28, 6}, {14, 12}, {7, 24}};
  for (const auto& stage : stages) {
    if ((options.smoke && stage.size != 14) || (options.profile && stage.size != 56)) continue;
    for (const int32_t shift : {0, 3}) {
      if (options.profile && shift == 0) continue;
      run<float>(options.smoke ? 1 : 64, stage.size, stage.heads, shift, runner);
      run<__nv_bfloat16>(options.smoke ? 1 : 64, stage.size, stage.heads, shift, runner);
    }
  }
  return runner.wrong();
}
