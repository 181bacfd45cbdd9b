// Products of small dense matrices on the CPU, as the bottleneck of channel attention needs them: tens to thousands of
// rows and columns, one result for a handful of floating-point operations a cycle and core. Plain C++17.
#pragma once

#include <cstdint>

#include "../../cpu/isa.h"

namespace dan_fast {

template <typename A>
struct Matrix {
  const A* data;
  int64_t rows, columns;
  int64_t row_stride = columns, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// out = addend + left right, or the sigmoid of that. Either stride of `right` is 1; `out` is contiguous and overlaps
// nothing but `addend`, which may be the same.
template <typename A>
struct Product {
  Matrix<A> left, right;
  const A* addend;  // of the shape of out; null: none
  A* out;
  bool sigmoid = false;
  // Where not null, twin_out = twin_left right as well, in one go; of the shapes and strides of left and out.
  const A* twin_left = nullptr;
  A* twin_out = nullptr;
  // Where not null, what product_pack made of `right`.
  const A* packed = nullptr;
};

#define DAN_FAST_DECLARE_PRODUCT(isa)                                                                          \
  namespace isa {                                                                                              \
  /* How many columns are taken at a time. */                                                                  \
  template <typename A>                                                                                        \
  int64_t product_width();                                                                                     \
  /* Columns [first, last) of `right`, for several products with it; room for whole product_widths of them. */ \
  template <typename A>                                                                                        \
  void product_pack(const Matrix<A>& right, int64_t first, int64_t last, A* packed);                           \
  /* Columns [first, last); `first` a multiple of product_width. A number does not depend on the range. */     \
  template <typename A>                                                                                        \
  void product_columns(const Product<A>& product, int64_t first, int64_t last);                                \
  }
DAN_FAST_EACH_ISA(DAN_FAST_DECLARE_PRODUCT)
#undef DAN_FAST_DECLARE_PRODUCT

}  // namespace dan_fast
