// rnn_scan: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "rnn_scan_params.h"

namespace effvit::ops {

struct rnn_scan : OpDefaults {
  static constexpr const char* kForward =
      "rnn_scan(x: B L G H D, weight: H G D D, bias?: G H D, initial?: B S H D | float32 packed; "
      "cell: int in 0..2 = 0) -> out: B L H D, trace: B L S H D | float32";
  static constexpr const char* kBackward =
      "rnn_scan_backward(grad_out: B L H D, grad_trace?: B L S H D | float32 packed, x: B L G H D, weight: H G D D, "
      "trace: B L S H D | float32 whole, bias?: G H D, initial?: B S H D | float32 packed; cell: int in 0..2 = 0) -> "
      "dx: B L G H D, dweight: H G D D, dbias?: G H D, dinitial?: B S H D | float32";
  static constexpr const char* kEmpty = "B L H";

  static void derive(Call& c) {
    constexpr int64_t kMaxHeadDim = 1024;
    constexpr const char* kNames[] = {"lstm", "gru", "slstm"};
    constexpr int64_t kGates[] = {4, 3, 4}, kStates[] = {2, 1, 4};
    effvit::check(c.dim("D") >= 1 && c.dim("D") <= kMaxHeadDim, c.op(), "x must have a head dim between 1 and ",
                  kMaxHeadDim, ", got ", Integers(c["x"]));
    const int32_t cell = c.integer("cell");
    effvit::check(c.dim("G") == kGates[cell], c.op(), "x must be [B, L, ", kGates[cell], ", H, D] for the cell ",
                  kNames[cell], ", got ", Integers(c["x"]));
    c.dim("S") = kStates[cell];
  }

  static RnnScanParams params(const Call& c) {
    RnnScanParams p;
    c.take("x", p.x, p.x_stride_b, p.x_stride_l, p.x_stride_g, p.x_stride_h);
    c.take("weight", p.weight, p.weight_stride_h, p.weight_stride_g, p.weight_stride_o);
    c.take("bias", p.bias, p.bias_stride_g, p.bias_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h);
    c.take("initial", p.initial), c.take("grad_trace", p.grad_trace);
    c.take("out", p.out), c.take("trace", p.trace);
    c.take("dx", p.dx), c.take("dweight", p.dweight), c.take("dbias", p.dbias), c.take("dinitial", p.dinitial);
    p.B = c.dim("B"), p.L = c.dim("L"), p.G = c.dim("G"), p.H = c.dim("H"), p.D = c.dim("D"), p.S = c.dim("S");
    p.cell = static_cast<RnnCell>(c.integer("cell"));
    p.dtype = c["x"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
