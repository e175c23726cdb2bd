// C entry to the kernels of integer row-wise operators in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#define EFFVIT_OP shiftmax
#define EFFVIT_ROWS_HEADER "../rows/shiftmax.h"
#include "cuda/int_rows.cuh"
#undef EFFVIT_OP
#undef EFFVIT_ROWS_HEADER
#define EFFVIT_OP shift_gelu
#define EFFVIT_ROWS_HEADER "../rows/shift_gelu.h"
#include "cuda/int_rows.cuh"
#undef EFFVIT_OP
#undef EFFVIT_ROWS_HEADER
#define EFFVIT_OP int_layer_norm
#define EFFVIT_ROWS_HEADER "../rows/int_layer_norm.h"
#include "cuda/int_rows.cuh"
#undef EFFVIT_OP
#undef EFFVIT_ROWS_HEADER
#define EFFVIT_OP int_add_layer_norm
#define EFFVIT_ROWS_HEADER "../rows/int_add_layer_norm.h"
#include "cuda/int_rows.cuh"
#undef EFFVIT_OP
#undef EFFVIT_ROWS_HEADER
#define EFFVIT_OP requantize
#define EFFVIT_ROWS_HEADER "../rows/requantize.h"
#include "cuda/int_rows.cuh"

// numbers: op, outer, inner, columns, the strides of the two dims of x, variant, x of the exponential, n, magic, shift
// of the magic, mask, bits, low, high, multiplier, shift, two flags, dtypes of the result, of x and of the residual,
// ends of the sum. tensors: x, residual, eight vectors, out, sum; all but x and out may be null. `message` (of `size`
// bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_int_rows(const int64_t* numbers, void** tensors,
                                                                    char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  const auto number = [&](int i) { return static_cast<int32_t>(numbers[i]); };
  IntRowsData p;
  p.dims = 2, p.size[0] = numbers[1], p.size[1] = numbers[2];
  p.rows = numbers[1] * numbers[2], p.columns = numbers[3];
  p.x_stride[0] = numbers[4], p.x_stride[1] = numbers[5];
  p.residual_stride[0] = numbers[2] * numbers[3], p.residual_stride[1] = numbers[3];
  p.variant = number(6), p.exp.x = static_cast<uint32_t>(numbers[7]), p.exp.n = static_cast<uint32_t>(numbers[8]);
  p.exp.limit = p.exp.x * p.exp.n, p.exp.magic = static_cast<uint32_t>(numbers[9]);
  p.exp.shift = static_cast<uint32_t>(numbers[10]), p.exp.mask = static_cast<uint32_t>(numbers[11]);
  p.bits = number(12), p.low = number(13), p.high = number(14), p.multiplier = number(15), p.shift = number(16);
  p.flags[0] = numbers[17] != 0, p.flags[1] = numbers[18] != 0, p.out_dtype = static_cast<DType>(numbers[19]);
  p.x_dtype = static_cast<DType>(numbers[20]), p.residual_dtype = static_cast<DType>(numbers[21]);
  p.sum_low = number(22), p.sum_high = number(23);
  p.x = tensors[0], p.residual = tensors[1];
  for (int k = 0; k < IntRowsData::kVectors; ++k) p.vectors[k] = static_cast<const int32_t*>(tensors[2 + k]);
  p.out = tensors[10], p.sum = static_cast<int16_t*>(tensors[11]);
  try {
    const auto launch = numbers[0] == 0   ? &cuda::shiftmax::launch_int_rows
                        : numbers[0] == 1 ? &cuda::shift_gelu::launch_int_rows
                        : numbers[0] == 2 ? &cuda::int_layer_norm::launch_int_rows
                        : numbers[0] == 4 ? &cuda::int_add_layer_norm::launch_int_rows
                                          : &cuda::requantize::launch_int_rows;
    if (launch(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
