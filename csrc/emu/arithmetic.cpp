// What tensor cores compute, on the arguments of the lanes of a warp; and conversions.
#include <algorithm>
#include <cmath>

#include "emulator.h"

namespace effvit {
namespace emu {
namespace {

float bf16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <float (*kConvert)(uint16_t)>
void mma(void** lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaArgs*>(lanes[l]);
    const int row = l / 4, col = l % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      const int shift = 16 * e;
      a[row][col + e] = kConvert(static_cast<uint16_t>(args.a[0] >> shift));
      a[row + 8][col + e] = kConvert(static_cast<uint16_t>(args.a[1] >> shift));
      a[row][col + 8 + e] = kConvert(static_cast<uint16_t>(args.a[2] >> shift));
      a[row + 8][col + 8 + e] = kConvert(static_cast<uint16_t>(args.a[3] >> shift));
      b[col + e][row] = kConvert(static_cast<uint16_t>(args.b[0] >> shift));
      b[col + 8 + e][row] = kConvert(static_cast<uint16_t>(args.b[1] >> shift));
      c[row][col + e] = args.c[e];
      c[row + 8][col + e] = args.c[2 + e];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaArgs*>(lanes[l]);
    const int row = l / 4, col = l % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      args.c[e] = c[row][col + e];
      args.c[2 + e] = c[row + 8][col + e];
    }
  }
}

}  // namespace

void mma_bf16(void** lanes) { mma<bf16_to_float>(lanes); }
void mma_f16(void** lanes) { mma<half_to_float>(lanes); }

void mma_s8(void** lanes) {
  int32_t a[16][32], b[32][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaInt8Args*>(lanes[l]);
    const int row = l / 4, k = l % 4 * 4;
    for (int e = 0; e < 4; ++e) {
      const auto byte = [e](uint32_t r) { return static_cast<int8_t>(r >> 8 * e); };
      a[row][k + e] = byte(args.a[0]);
      a[row + 8][k + e] = byte(args.a[1]);
      a[row][k + 16 + e] = byte(args.a[2]);
      a[row + 8][k + 16 + e] = byte(args.a[3]);
      b[k + e][row] = byte(args.b[0]);
      b[k + 16 + e][row] = byte(args.b[1]);
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaInt8Args*>(lanes[l]);
    for (int e = 0; e < 4; ++e) {
      auto sum = static_cast<uint32_t>(args.c[e]);  // it wraps
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[l / 4 + e / 2 * 8][k] * b[k][l % 4 * 2 + e % 2]);
      args.c[e] = static_cast<int32_t>(sum);
    }
  }
}

void mma_sp_s8(void** lanes) {
  int32_t a[16][64] = {}, b[64][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaSparseArgs*>(lanes[l]);
    const int group = l / 4, t = l % 4;
    for (int i = 0; i < 16; ++i) b[i / 4 * 16 + t * 4 + i % 4][group] = static_cast<int8_t>(args.b[i / 4] >> i % 4 * 8);
    const int row = group + t % 2 * 8, half = t / 2;
    for (int quad = 0; quad < 8; ++quad) {
      const uint32_t nibble = args.metadata >> 4 * quad & 15u, kept[2] = {nibble & 3u, nibble >> 2};
      if (kept[0] >= kept[1])
        fail("mma.sp with metadata nibble " + std::to_string(nibble) + " in lane " + std::to_string(l));
      for (int i = 0; i < 2; ++i) {
        const int at = quad * 2 + i;  // of the 16 kept numbers of this half row
        const auto& holder = *static_cast<MmaSparseArgs*>(lanes[group * 4 + at / 4]);
        a[row][half * 32 + quad * 4 + static_cast<int>(kept[i])] =
            static_cast<int8_t>(holder.a[half * 2 + t % 2] >> at % 4 * 8);
      }
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const auto& args = *static_cast<MmaSparseArgs*>(lanes[l]);
    for (int e = 0; e < 4; ++e) {
      auto sum = static_cast<uint32_t>(args.c[e]);  // it wraps
      for (int k = 0; k < 64; ++k) sum += static_cast<uint32_t>(a[l / 4 + e / 2 * 8][k] * b[k][l % 4 * 2 + e % 2]);
      args.c[e] = static_cast<int32_t>(sum);
    }
  }
}

int32_t float_to_int(float f) {
  if (std::isnan(f)) return 0;
  const double rounded = std::nearbyint(static_cast<double>(f));
  return static_cast<int32_t>(std::min(std::max(rounded, -2147483648.), 2147483647.));
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  if ((h & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    std::memcpy(&f, &bits, 4);
  } else {
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t float_to_half(float f) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: the addition rounds
    float x;
    std::memcpy(&x, &bits, 4);
    x += 0.5f;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | bits >> 13);
}

}  // namespace emu
}  // namespace effvit
