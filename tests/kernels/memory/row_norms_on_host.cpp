// usage: row_norms_on_host float32|float64 ROWS COLUMNS ROW_STRIDE < features > norms
#include "../cuda_on_host.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../../csrc/memory/row_norms.cuh"

template <typename T>
int run(int64_t rows, int64_t columns, int64_t row_stride) {
  std::vector<T> features(static_cast<size_t>(rows * row_stride));
  if (std::fread(features.data(), sizeof(T), features.size(), stdin) != features.size()) return 2;
  // A spare element on each side shows a kernel that writes beyond its rows.
  std::vector<T> norms(static_cast<size_t>(rows) + 2, T(-1));
  constexpr unsigned kThreads = 64;
  const unsigned blocks = static_cast<unsigned>((rows + 1) / (kThreads / dan_fast::kLanes));
  on_host::launch(blocks, kThreads, [&] {
    dan_fast::row_sq_norms_kernel<T, T>(features.data(), row_stride, rows, columns, norms.data() + 1);
  });
  return std::fwrite(norms.data(), sizeof(T), norms.size(), stdout) == norms.size() ? 0 : 3;
}

int main(int argc, char** argv) {
  if (argc != 5) return 1;
  const int64_t rows = std::atoll(argv[2]), columns = std::atoll(argv[3]), row_stride = std::atoll(argv[4]);
  return std::string(argv[1]) == "float32" ? run<float>(rows, columns, row_stride)
                                           : run<double>(rows, columns, row_stride);
}
