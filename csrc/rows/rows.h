// Row-wise operators: a declaration and a functor in rows/<op>.h, everything else is here, in cpu/rows.inl.h and in
// cuda/rows.cuh.
#pragma once
#include "../common/declaration.h"
#include "params.h"

namespace effvit {

// Collects the tensors of a call, and makes one dim of those that lie behind each other in all of them.
class RowsOf {
 public:
  RowsOf(const Call& c, int64_t columns) : call_(c) {
    p_.columns = columns;
    p_.dtype = c.views[c.declaration.first].dtype;
  }
  // Columns from `column` on, of a tensor whose rows are the call's.
  RowsOf& with(const View& v, int64_t column = 0) {
    const int64_t bytes = column * element_bytes(p_.dtype);
    p_.data[count_] = static_cast<char*>(v.data) + bytes;
    int64_t whole = v.dim > 0 ? v.size[v.dim - 1] : 1;  // outputs have no strides yet: they are contiguous
    const bool output = &v >= call_.views + call_.declaration.inputs.size();
    for (int k = v.dim - 2; k >= 0; --k) {
      stride_[count_][k] = output ? whole : v.stride[k];
      whole *= v.size[k];
    }
    ++count_;
    return *this;
  }

  template <class Op>
  RowsParams<Op> params() {
    p_.rows = 1;
    p_.dims = 0;
    int64_t size[RowsData::kMostDims] = {};
    for (int k = 0; k < call_.lead_dims; ++k) {
      p_.rows *= call_.lead[k];
      if (call_.lead[k] == 1) continue;
      bool follows = p_.dims > 0;
      for (int i = 0; follows && i < count_; ++i) follows = p_.stride[i][p_.dims - 1] == stride_[i][k] * call_.lead[k];
      const int at = follows ? p_.dims - 1 : p_.dims++;
      size[at] = (follows ? size[at] : 1) * call_.lead[k];
      for (int i = 0; i < count_; ++i) p_.stride[i][at] = stride_[i][k];
    }
    for (int k = 0; k < RowsData::kMostDims; ++k) p_.size[k] = size[k];
    // Rows that follow each other without a gap in every tensor are one row.
    bool one = p_.dims == 1;
    for (int i = 0; i < count_; ++i) one = one && p_.stride[i][0] == p_.columns;
    if (one) p_.columns *= p_.rows, p_.rows = 1, p_.dims = 0;
    RowsParams<Op> result;
    static_cast<RowsData&>(result) = p_;
    return result;
  }

 private:
  const Call& call_;
  RowsData p_;
  int64_t stride_[RowsData::kMost][6] = {};
  int count_ = 0;
};

// Of an op whose tensors all have the same columns: as the declaration lists them.
template <class Op>
RowsParams<Op> rows_of(const Call& c) {
  const View& first = c.views[c.declaration.first];
  RowsOf rows(c, first.size[first.dim - 1]);
  for (size_t i = 0; i < c.declaration.inputs.size() + c.declaration.outputs.size(); ++i) rows.with(c.views[i]);
  return rows.params<Op>();
}

}  // namespace effvit
