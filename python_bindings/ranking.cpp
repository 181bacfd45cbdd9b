// The Python module dan_fast._ranking: ranks of true matches over NumPy arrays, without a copy and without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../csrc/ranking/ranking.h"

namespace py = pybind11;

namespace dan_fast {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

[[noreturn]] void refuse(const std::string& what) { throw py::value_error("dan_fast._ranking: " + what); }

// A matrix whose rows may lie further apart than they are long.
template <typename S>
struct Matrix {
  const S* data;
  int64_t rows, columns, stride;

  Matrix(const py::array& array, const char* name) {
    if (array.ndim() != 2 || array.itemsize() != sizeof(S)) refuse(std::string(name) + " is no matrix of its type");
    data = static_cast<const S*>(array.data());
    rows = array.shape(0), columns = array.shape(1);
    stride = array.strides(0) / static_cast<py::ssize_t>(sizeof(S));
    if (rows == 0 || columns == 0) refuse(std::string(name) + " is empty");
    if (array.strides(0) % static_cast<py::ssize_t>(sizeof(S)) != 0 || (rows > 1 && stride < columns) ||
        (columns > 1 && array.strides(1) != static_cast<py::ssize_t>(sizeof(S)))) {
      refuse("the columns of " + std::string(name) + " are not adjacent");
    }
  }
};

template <typename T>
const T* vector(const Array<T>& array, int64_t size, const char* name) {
  if (array.ndim() != 1 || array.shape(0) != size) {
    refuse(std::string(name) + " is not " + std::to_string(size) + " long");
  }
  return array.data();
}

// Checked, because a wrong place would be read: the result array belongs to it.
Pairs pairs_of(const Array<int64_t>& offsets, const Array<int64_t>& gallery, const Array<uint8_t>& junk,
               const Array<int64_t>& match_offsets, Array<int64_t>& ranks, int64_t queries, int64_t gallery_size) {
  Pairs pairs{};
  pairs.queries = queries;
  pairs.offsets = vector(offsets, queries + 1, "offsets");
  pairs.match_offsets = vector(match_offsets, queries + 1, "match_offsets");
  const int64_t count = pairs.offsets[queries];
  pairs.gallery = vector(gallery, count, "places");
  pairs.junk = vector(junk, count, "junk");
  for (int64_t p = 0; p < count; ++p) {
    if (pairs.gallery[p] < 0 || pairs.gallery[p] >= gallery_size) refuse("a place is not in the gallery");
  }
  for (int64_t q = 0; q < queries; ++q) {
    int64_t matches = 0;
    if (pairs.offsets[0] != 0 || pairs.offsets[q + 1] < pairs.offsets[q] || pairs.offsets[q + 1] > count) {
      refuse("offsets do not ascend from 0");
    }
    for (int64_t p = pairs.offsets[q]; p < pairs.offsets[q + 1]; ++p) matches += pairs.junk[p] ? 0 : 1;
    if (pairs.match_offsets[0] != 0 || pairs.match_offsets[q + 1] - pairs.match_offsets[q] != matches) {
      refuse("match_offsets do not count what is not junk");
    }
  }
  if (gallery_size > INT32_MAX) refuse("the gallery is larger than 2^31 entries");
  ranks = Array<int64_t>(pairs.match_offsets[queries]);
  pairs.ranks = ranks.mutable_data();
  return pairs;
}

// Calls work with a value of the storage type of that name and one of the type in which it is compared.
template <typename Work>
auto for_type(const std::string& name, const Work& work) {
  if (name == "float32") return work(float{}, float{});
  if (name == "float64") return work(double{}, double{});
  if (name == "float16") return work(Float16{}, float{});
  if (name == "bfloat16") return work(BFloat16{}, float{});
  refuse("no kernels for " + name);
}

// Python's handlers of signals, Ctrl-C's among them, which only see the interpreter; without the GIL before and after.
void poll_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Array<double> square_norms_of(const py::array& features, const std::string& dtype, int64_t threads) {
  return for_type(dtype, [&](auto storage, auto) {
    using S = decltype(storage);
    const Matrix<S> matrix(features, "features");
    Array<double> norms(matrix.rows);
    double* out = norms.mutable_data();
    const py::gil_scoped_release release;
    square_norms(matrix.data, matrix.stride, matrix.rows, matrix.columns, threads, poll_signals, out);
    return norms;
  });
}

py::object distances_ranks(const py::array& distances, const std::string& dtype, const Array<int64_t>& offsets,
                           const Array<int64_t>& gallery, const Array<uint8_t>& junk,
                           const Array<int64_t>& match_offsets, int64_t threads) {
  return for_type(dtype, [&](auto storage, auto arithmetic) -> py::object {
    using S = decltype(storage);
    const Matrix<S> matrix(distances, "distances");
    Array<int64_t> ranks;
    const Pairs pairs = pairs_of(offsets, gallery, junk, match_offsets, ranks, matrix.rows, matrix.columns);
    const DistanceRows<S> rows{matrix.data, matrix.stride, matrix.columns};
    bool numbers;
    {
      const py::gil_scoped_release release;
      numbers = rank_distances<S, decltype(arithmetic)>(rows, pairs, threads, poll_signals);
    }
    if (!numbers) return py::none();
    return std::move(ranks);
  });
}

Array<int64_t> features_ranks(const py::array& query, const py::array& gallery_features, const std::string& dtype,
                              bool cosine, const Array<double>& query_norms, const Array<double>& gallery_norms,
                              const Array<double>& steps, double largest_gallery_norm, double scale,
                              const Array<int64_t>& offsets, const Array<int64_t>& gallery,
                              const Array<uint8_t>& junk, const Array<int64_t>& match_offsets, int64_t threads) {
  return for_type(dtype, [&](auto storage, auto arithmetic) {
    using S = decltype(storage);
    const Matrix<S> queries(query, "query"), entries(gallery_features, "gallery");
    if (queries.columns != entries.columns) refuse("query and gallery differ in width");
    Array<int64_t> ranks;
    const Pairs pairs = pairs_of(offsets, gallery, junk, match_offsets, ranks, queries.rows, entries.rows);
    const FeatureRows<S> rows{cosine,
                              queries.columns,
                              entries.rows,
                              queries.data,
                              queries.stride,
                              entries.data,
                              entries.stride,
                              vector(query_norms, queries.rows, "query_norms"),
                              vector(gallery_norms, entries.rows, "gallery_norms"),
                              vector(steps, queries.rows, "steps"),
                              largest_gallery_norm,
                              scale};
    const py::gil_scoped_release release;
    rank_features<S, decltype(arithmetic)>(rows, pairs, threads, poll_signals);
    return ranks;
  });
}

}  // namespace
}  // namespace dan_fast

PYBIND11_MODULE(_ranking, module) {
  using namespace dan_fast;
  module.def("isa", &isa_name);
  module.def("square_norms", &square_norms_of, py::arg("features").noconvert(), py::arg("dtype"), py::arg("threads"));
  module.def("distances_ranks", &distances_ranks, py::arg("distances").noconvert(), py::arg("dtype"),
             py::arg("offsets"), py::arg("places"), py::arg("junk"), py::arg("match_offsets"), py::arg("threads"),
             "Ranks of the matches, ascending within a query; None if a distance is NaN.");
  module.def("features_ranks", &features_ranks, py::arg("query").noconvert(), py::arg("gallery").noconvert(),
             py::arg("dtype"), py::arg("cosine"), py::arg("query_norms"), py::arg("gallery_norms"), py::arg("steps"),
             py::arg("largest_gallery_norm"), py::arg("scale"), py::arg("offsets"), py::arg("places"),
             py::arg("junk"), py::arg("match_offsets"), py::arg("threads"));
}
