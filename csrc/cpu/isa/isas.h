// The instruction sets that CPU kernels are compiled for: the one table of them, best last, emulated ones after it.
// CMake reads these lines, C++ includes them with EFFVIT_ISA defined, tests ask the library.
//
// name, base: what serves an op that has no use for what this one adds; adds: the products that it has instructions
// for, BF16 or INT8: only ops that have such products are compiled for it ("": it adds something for every op); lanes:
// floats in a vector; emulates: whose code it runs, compiled for any AVX2 machine, in test builds ("-": it is real);
// target: groups of what compilers call features, below; has: EFFVIT_HAS_<X> in the kernels, and what follows from it:
// see instantiate.cpp.
//
// AVX512_BF16, AVX_VNNI and AVX512_VNNI are instructions, BF16_PRODUCTS, INT8_DOT and TILES are paths in the code,
// EMULATED_TILES are tiles in memory.
// clang-format off
EFFVIT_ISA(generic, -, "", 4, -, "", "")
EFFVIT_ISA(avx2, -, "", 8, -, "AVX2", "AVX2")
EFFVIT_ISA(avx_vnni, avx2, "INT8", 8, -, "AVX2 AVX_VNNI", "AVX2 AVX_VNNI")
EFFVIT_ISA(avx512, -, "", 16, -, "AVX2 AVX512", "AVX512")
EFFVIT_ISA(avx512_vnni, avx512, "INT8", 16, -, "AVX2 AVX512 VNNI", "AVX512 AVX512_VNNI")
EFFVIT_ISA(avx512_bf16, avx512_vnni, "BF16", 16, -, "AVX2 AVX512 VNNI BF16", "AVX512 AVX512_BF16")
EFFVIT_ISA(amx, avx512_bf16, "BF16 INT8", 16, -, "AVX2 AVX512 VNNI BF16 AMX", "AVX512 AVX512_BF16 TILES")
EFFVIT_ISA(avx_vnni_emulated, avx2, "INT8", 8, avx_vnni, "AVX2", "AVX2 INT8_DOT")
EFFVIT_ISA(avx512_emulated, -, "", 16, avx512, "AVX2", "")
EFFVIT_ISA(avx512_vnni_emulated, avx512_emulated, "INT8", 16, avx512_vnni, "AVX2", "INT8_DOT")
EFFVIT_ISA(avx512_bf16_emulated, avx512_vnni_emulated, "BF16", 16, avx512_bf16, "AVX2", "BF16_PRODUCTS INT8_DOT")
EFFVIT_ISA(amx_emulated, avx512_bf16_emulated, "BF16 INT8", 16, amx, "AVX2", "EMULATED_TILES")
// clang-format on

// target AVX2: avx2,fma,f16c
// target AVX512: avx512f,avx512bw,avx512dq,avx512vl
// target AVX_VNNI: avxvnni
// target VNNI: avx512vnni
// target BF16: avx512bf16
// target AMX: amx-tile,amx-bf16,amx-int8
