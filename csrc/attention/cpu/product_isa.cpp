#include "product.h"

#include "../../cpu/tile.h"

namespace dan_fast::DAN_FAST_ISA {
namespace {

constexpr int64_t kBlock = 128;  // rows whose sums stay in the first-level cache

using Quad = Vector<float, 16>;
using Words4 = Vector<uint32_t, 16>;

inline Quad interleave(Quad a, Quad b, bool low) {
#if defined(__clang__)
  return low ? __builtin_shufflevector(a, b, 0, 4, 1, 5) : __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  return low ? __builtin_shuffle(a, b, Words4{0, 4, 1, 5}) : __builtin_shuffle(a, b, Words4{2, 6, 3, 7});
#endif
}

// to[p * stride + r] = rows[r][p] for four rows.
inline void turn(const float* const* rows, int64_t size, float* to, int64_t stride) {
  int64_t p = 0;
  for (; p + 4 <= size; p += 4, to += 4 * stride) {
    const Quad a = load_bits<Quad>(rows[0] + p), b = load_bits<Quad>(rows[1] + p);
    const Quad c = load_bits<Quad>(rows[2] + p), d = load_bits<Quad>(rows[3] + p);
    const Quad ac_low = interleave(a, c, true), bd_low = interleave(b, d, true);
    const Quad ac_high = interleave(a, c, false), bd_high = interleave(b, d, false);
    const Quad turned[4] = {interleave(ac_low, bd_low, true), interleave(ac_low, bd_low, false),
                            interleave(ac_high, bd_high, true), interleave(ac_high, bd_high, false)};
    for (int64_t i = 0; i < 4; ++i) std::memcpy(to + i * stride, &turned[i], sizeof(Quad));
  }
  for (; p < size; ++p, to += stride) {
    for (int r = 0; r < 4; ++r) to[r] = rows[r][p];
  }
}

inline void turn(const double* const* rows, int64_t size, double* to, int64_t stride) {
  for (int64_t p = 0; p < size; ++p, to += stride) {
    for (int r = 0; r < 4; ++r) to[r] = rows[r][p];
  }
}

// Some rows of a strip of `right`, with zeros beyond the last column.
template <typename A>
void pack(const Matrix<A>& right, int64_t k, int64_t count, int64_t column, int64_t columns, A* panel) {
  const A* from = right.data + k * right.row_stride + column * right.column_stride;
  if (right.column_stride == 1) {
    for (int64_t i = 0; i < count; ++i, from += right.row_stride) {
      A* line = panel + i * kStrip<A>;
      widen(from, columns, line);
      std::fill(line + columns, line + kStrip<A>, A(0));
    }
    return;
  }
  static_assert(kStrip<A> % 4 == 0);
  for (int64_t c = 0; c < kStrip<A>; c += 4) {
    const A* rows[4];
    for (int64_t r = 0; r < 4; ++r) rows[r] = from + std::min(c + r, columns - 1) * right.column_stride;
    turn(rows, count, panel + c, kStrip<A>);
  }
}

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
          const A* panel = product_.packed + column * product_.right.rows + k * kStrip<A>;
          if (product_.packed == nullptr) {
            pack(product_.right, k, count, column, columns, panel_.get());
            panel = panel_.get();
          }
          multiply_block(product_.left.data, panel, row, rows, k, count, sums_.get());
          if (twin) multiply_block(product_.twin_left, panel, row, rows, k, count, twin_sums_.get());
        }
        write(sums_.get(), product_.addend, row, rows, column, columns, product_.out);
        if (twin) write(twin_sums_.get(), nullptr, row, rows, column, columns, product_.twin_out);
      }
    }
  }

 private:
  void multiply_block(const A* left, const A* panel, int64_t row, int64_t rows, int64_t k, int64_t count, A* to) const {
    for (int64_t tile = 0; tile < rows; tile += kTileRows) {
      const A* tile_rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        tile_rows[r] = left + std::min(row + tile + r, product_.left.rows - 1) * product_.left.row_stride +
                       k * product_.left.column_stride;
      }
      A* sums = to + tile * kStrip<A>;
      if (product_.left.column_stride == 1) {
        multiply<kTileRows, kTileVectors>(tile_rows, count, panel, k > 0, sums, kStrip<A>);
      } else {
        multiply<kTileRows, kTileVectors>(
            tile_rows, count, panel, k > 0, sums, kStrip<A>, product_.left.column_stride);
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
void product_pack(const Matrix<A>& right, int64_t first, int64_t last, A* packed) {
  for (int64_t column = first; column < last; column += kStrip<A>) {
    pack(right, 0, right.rows, column, std::min(kStrip<A>, last - column), packed + column * right.rows);
  }
}

template <typename A>
void product_columns(const Product<A>& product, int64_t first, int64_t last) {
  if (product.left.rows == 0 || first >= last) return;
  ProductStrips<A>(product).run(first, last);
}

#define DAN_FAST_INSTANTIATE(A)                                                     \
  template int64_t product_width<A>();                                             \
  template void product_pack<A>(const Matrix<A>&, int64_t, int64_t, A*);           \
  template void product_columns<A>(const Product<A>&, int64_t, int64_t);
DAN_FAST_INSTANTIATE(float)
DAN_FAST_INSTANTIATE(double)

}  // namespace dan_fast::DAN_FAST_ISA
