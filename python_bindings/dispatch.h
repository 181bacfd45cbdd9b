// How an operator finds its kernel, by the dtype and the device of a tensor, and how its flat arguments become a
// struct.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "../csrc/common/scalar.h"
#include "check.h"

#ifdef DAN_FAST_CUDA
// A CPU-only PyTorch lacks these; the binary must load there all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
#endif

namespace dan_fast {

inline void check_storage(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, " must be float64, float32, bfloat16 or float16, got ", dtype_name(type));
}

// The dtype of what is computed from a tensor.
inline ScalarType statistics_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// function(S{}, A{}) for the type that a tensor is stored in, which check_storage has seen, and that of its statistics.
template <typename Function>
void for_storage(const Tensor& tensor, const Function& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return function(double{}, double{});
    case ScalarType::Float:
      return function(float{}, float{});
    case ScalarType::BFloat16:
      return function(BFloat16{}, float{});
    default:
      return function(Float16{}, float{});
  }
}

// function(T{}) for a tensor that is float32 or float64.
template <typename Function>
void for_real(const Tensor& tensor, const Function& function) {
  tensor.scalar_type() == ScalarType::Double ? function(double{}) : function(float{});
}

// Where `like` is on the CPU, on_cpu(). Else launch(stream), which returns a cudaError_t, on its device and the current
// stream. `launch` takes its stream as `auto`: without CUDA it is not compiled. What it allocates goes back to
// PyTorch's allocator when it returns, for what is queued on this stream later.
template <typename OnCpu, typename Launch>
void on_device_of(
    [[maybe_unused]] const Tensor& like, [[maybe_unused]] const char* what, const OnCpu& on_cpu,
    [[maybe_unused]] const Launch& launch) {
#ifdef DAN_FAST_CUDA
  if (like.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    char* message = nullptr;
    torch_c10_cuda_check_msg(launch(stream), __FILE__, what, __LINE__, true, &message);
    if (message == nullptr) return;
    const std::string copy(message);
    torch_c10_cuda_free_error_msg(message);
    STD_TORCH_CHECK(false, copy);
  }
#endif
  on_cpu();
}

// A std::tuple of so many tensors: what an operator returns, from std::tuple_cat of an array, and types of arguments.
template <size_t kCount>
using Tensors = decltype(std::tuple_cat(std::declval<std::array<Tensor, kCount>>()));

template <typename... Tuples>
using Joined = decltype(std::tuple_cat(std::declval<Tuples>()...));

template <typename Types>
struct Flat;
template <typename... Types>
struct Flat<std::tuple<Types...>> {
  template <typename Arguments, auto kOperator>
  static auto call(Types... arguments) {
    return kOperator(Arguments{std::move(arguments)...});
  }
};

// `function`, which takes one struct whose members have the types and the order of the schema, Arguments::Types.
#define DAN_FAST_BOX(Arguments, function) TORCH_BOX((&::dan_fast::Flat<Arguments::Types>::call<Arguments, function>))

}  // namespace dan_fast
