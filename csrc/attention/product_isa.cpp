#include "product.h"

#include "../memory/stream_tile.h"
#include "head_cpu_tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = kRegisters == 32 ? 8 : 4, kTileVectors = kRegisters == 32 ? 3 : 2;
#endif

template <typename A>
constexpr int64_t kStrip = kTileVectors * kWidth<A>;  // columns at a time
constexpr int64_t kBlock = 128;                       // rows whose sums stay in the first-level cache

// One thread's columns.
template <typename A>
class ProductStrips {
 public:
  explicit ProductStrips(const Product<A>& product)
      : product_(product), panel_(kChain * kStrip<A>), sums_(kBlock * kStrip<A>),
        twin_sums_(product.twin_out == nullptr ? 0 : kBlock * kStrip<A>) {}

  void run(int64_t first, int64_t last) {
    const bool twin = product_.twin_out != nullptr;
    for (int64_t column = first; column < last; column += kStrip<A>) {
      const int64_t columns = std::min(kStrip<A>, last - column);
      for (int64_t row = 0; row < product_.left.rows; row += kBlock) {
        const int64_t rows = std::min(kBlock, product_.left.rows - row);
        // Without depth there is a product, too: one empty chain.
        for (int64_t k = 0; k == 0 || k < product_.left.columns; k += kChain) {
          const int64_t count = std::min(kChain, product_.left.columns - k);
          pack(k, count, column, columns);
          multiply_block(product_.left.data, row, rows, k, count, sums_.numbers);
          if (twin) multiply_block(product_.twin_left, row, rows, k, count, twin_sums_.numbers);
        }
        write(sums_.numbers, product_.addend, row, rows, column, columns, product_.out);
        if (twin) write(twin_sums_.numbers, nullptr, row, rows, column, columns, product_.twin_out);
      }
    }
  }

 private:
  // Some rows of a strip of `right`, with zeros beyond the last column.
  void pack(int64_t k, int64_t count, int64_t column, int64_t columns) {
    const Matrix<A>& right = product_.right;
    const A* from = right.data + k * right.row_stride + column * right.column_stride;
    if (right.column_stride == 1) {
      for (int64_t i = 0; i < count; ++i, from += right.row_stride) {
        A* line = panel_.numbers + i * kStrip<A>;
        widen(from, columns, line);
        std::fill(line + columns, line + kStrip<A>, A(0));
      }
      return;
    }
    static_assert(kStrip<A> % 4 == 0);
    for (int64_t c = 0; c < kStrip<A>; c += 4) {
      const A* rows[4];
      for (int64_t r = 0; r < 4; ++r) rows[r] = from + std::min(c + r, columns - 1) * right.column_stride;
      turn(rows, count, panel_.numbers + c, kStrip<A>);
    }
  }

  void multiply_block(const A* left, int64_t row, int64_t rows, int64_t k, int64_t count, A* to) const {
    for (int64_t tile = 0; tile < rows; tile += kTileRows) {
      const A* tile_rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        tile_rows[r] = left + std::min(row + tile + r, product_.left.rows - 1) * product_.left.row_stride +
                       k * product_.left.column_stride;
      }
      A* sums = to + tile * kStrip<A>;
      if (product_.left.column_stride == 1) {
        multiply<kTileRows, kTileVectors>(tile_rows, count, panel_.numbers, k > 0, sums, kStrip<A>);
      } else {
        multiply<kTileRows, kTileVectors>(
            tile_rows, count, panel_.numbers, k > 0, sums, kStrip<A>, product_.left.column_stride);
      }
    }
  }

  void write(A* from, const A* addend, int64_t row, int64_t rows, int64_t column, int64_t columns, A* out) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * product_.right.columns + column;
      A* sums = from + r * kStrip<A>;
      for (int64_t c = 0; c < columns; c += kWidth<A>) {
        const int64_t left = columns - c;
        A* value = sums + c;
        if (addend != nullptr) store(value, load_up_to<A>(addend + at + c, left) + load(value));
        for (int64_t i = 0; product_.sigmoid && i < kWidth<A>; ++i) value[i] = sigmoid(value[i]);
        store_up_to<A>(out + at + c, load(value), left);
      }
    }
  }

  const Product<A> product_;
  Scratch<A> panel_;  // (kChain, kStrip)
  Scratch<A> sums_, twin_sums_;  // (kBlock, kStrip)
};

}  // namespace

template <typename A>
int64_t product_width() {
  return kStrip<A>;
}

template <typename A>
void product_columns(const Product<A>& product, int64_t first, int64_t last) {
  if (product.left.rows == 0 || first >= last) return;
  ProductStrips<A>(product).run(first, last);
}

template int64_t product_width<float>();
template int64_t product_width<double>();
template void product_columns<float>(const Product<float>&, int64_t, int64_t);
template void product_columns<double>(const Product<double>&, int64_t, int64_t);

}  // namespace dan_fast::DAN_FAST_ISA
