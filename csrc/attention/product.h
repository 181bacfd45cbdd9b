// Products of small dense matrices on the CPU, as the bottleneck of channel attention needs them: tens to thousands of
// rows and columns, one result for a handful of floating-point operations a cycle and core. Plain C++17.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace dan_fast {

// out = addend + left right, or the sigmoid of that, with left (rows, depth), right (depth, columns). A stride is what lies between two
// neighbours, so that a transposed matrix is a matter of strides; either stride of `right` is 1. The others do not
// overlap `out`, but `addend` may be `out`.
template <typename A>
struct Product {
  int64_t rows, columns, depth;
  const A* left;
  int64_t left_row_stride, left_column_stride;
  const A* right;
  int64_t right_row_stride, right_column_stride;
  const A* addend;  // rows as far apart as those of out; null: none
  A* out;           // columns adjacent
  int64_t out_stride;
  bool sigmoid;  // of every number, before it is written
  // Where not null, twin_out = twin_left right as well, which have the shapes and strides of left and out.
  const A* twin_left = nullptr;
  A* twin_out = nullptr;
};

#define DAN_FAST_DECLARE_PRODUCT(isa)                                                                          \
  namespace isa {                                                                                              \
  /* How many columns are taken at a time. */                                                                  \
  template <typename A>                                                                                        \
  int64_t product_width();                                                                                     \
  /* Columns [first, last); `first` a multiple of product_width. A number does not depend on the range. */     \
  template <typename A>                                                                                        \
  void product_columns(const Product<A>& product, int64_t first, int64_t last);                                \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_PRODUCT)
#undef DAN_FAST_DECLARE_PRODUCT

}  // namespace dan_fast
