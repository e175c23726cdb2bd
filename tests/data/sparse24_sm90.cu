// Where CUTLASS 3 reads 2:4 weights [m, k] on sm_90, from its own layouts: tests/data/sparse24_sm90.json, on the host.
//   pip download --no-deps nvidia-cutlass==4.2.0.0, unpack it, and with cutlass_library/source/include as $INCLUDE:
//   nvcc -std=c++17 -w --expt-relaxed-constexpr -arch=sm_90 -I $INCLUDE sparse24_sm90.cu && ./a.out >
//   sparse24_sm90.json
#include <cstdio>

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/numeric_types.h"

template <class T, int kTileK>
void print(const char* dtype, int m, int k, const char* separator) {
  using namespace cute;
  using Metadata = sparse_elem<8, uint8_t>;  // a byte is that of eight neighbours along K
  using Unit = uint_bit_t<sizeof_bits_v<T>>;
  using Config = cutlass::Sm90GemmSparseConfig<sparse_elem<2, T>, GMMA::Major::K, Metadata, Int<kTileK>>;
  static uint8_t memory[1 << 20];
  const auto problem = make_tuple(m, 8, k, 1);
  const auto bytes = recast<uint8_t>(make_tensor(recast_ptr<Metadata>(memory), Config::fill_layoutE(problem)));
  const auto values =
      recast<Unit>(make_tensor(recast_ptr<sparse_elem<2, Unit>>(memory), Config::fill_layoutA(problem)));
  std::printf("  {\"dtype\": \"%s\", \"tile_k\": %d, \"m\": %d, \"k\": %d, \"bytes\": %d,\n", dtype, kTileK, m, k,
              int(size(bytes)));
  std::printf("   \"values\": [%d, %d],\n   \"value_offsets\": [%d, %d, %d, %d],\n   \"offsets\": [\n",
              int(size<0>(values)), int(size<1>(values)), int(values.layout()(0, 0, 0)), int(values.layout()(0, 1, 0)),
              int(values.layout()(1, 0, 0)), int(values.layout()(3, 5, 0)));
  for (int i = 0; i < m; ++i) {
    std::printf("    [");
    for (int j = 0; j < (k + 7) / 8; ++j) std::printf("%s%d", j ? "," : "", int(bytes.layout()(i, j, 0)));
    std::printf("]%s\n", i + 1 < m ? "," : "");
  }
  std::printf("   ]}%s\n", separator);
}

int main() {
  std::printf("[\n");
  print<int8_t, 64>("int8", 70, 136, ",");
  print<int8_t, 128>("int8", 70, 136, ",");
  print<cutlass::half_t, 32>("float16", 70, 72, ",");
  print<cutlass::half_t, 64>("float16", 70, 72, ",");
  print<cutlass::bfloat16_t, 128>("bfloat16", 70, 136, "");
  std::printf("]\n");
}
