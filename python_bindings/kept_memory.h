// Memory of large results on the CPU that is kept when they are freed, for the next of their size. An allocator gives
// so much back to the operating system, and fresh pages take longer than the kernel that fills them: 26 MB 4 ms of 10
// on two cores. A training step asks for the same sizes again and again; a GPU's memory is kept by PyTorch itself.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace dan_fast {

class KeptMemory {
 public:
  // Smaller results are an allocator's daily business.
  static constexpr size_t kSmallest = size_t{4} << 20;

  // Not destroyed: a tensor may outlive everything static.
  static KeptMemory& instance() {
    static KeptMemory* const kept = new KeptMemory;
    return *kept;
  }

  // Null where there is no memory.
  void* take(size_t bytes) {
    // Nobody waits for the lock: a process that was forked while another thread held it would do so for ever.
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      const auto found = std::find_if(blocks_.begin(), blocks_.end(), [=](const Block& b) { return b.bytes == bytes; });
      if (found != blocks_.end()) {
        void* memory = found->memory;
        blocks_.erase(found);
        return memory;
      }
    }
    constexpr size_t kPage = 4096;
    return std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  }

  void give_back(void* memory, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(memory);
    blocks_.push_back({memory, bytes});
    if (blocks_.size() <= kBlocks) return;
    std::free(blocks_.front().memory);
    blocks_.erase(blocks_.begin());
  }

 private:
  // The gradients of a map and of its classifier, and the images of two batches.
  static constexpr size_t kBlocks = 4;

  struct Block {
    void* memory;
    size_t bytes;
  };

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the one longest unused first
};

// A dense CPU tensor in kept memory where it is large, else torch.empty's, which is `ordinary`. Like that of a NumPy
// array, its storage cannot be resized.
template <typename Ordinary>
torch::stable::Tensor in_kept_memory(
    torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides,
    torch::headeronly::ScalarType dtype, size_t bytes, const Ordinary& ordinary) {
  if (bytes < KeptMemory::kSmallest) return ordinary();
  void* memory = KeptMemory::instance().take(bytes);
  if (memory == nullptr) return ordinary();  // which says that there is none
  return torch::stable::from_blob(
      memory, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
      [bytes](void* freed) { KeptMemory::instance().give_back(freed, bytes); });
}

// torch.empty_like of a dense CPU tensor.
inline torch::stable::Tensor kept_empty_like(const torch::stable::Tensor& like) {
  const size_t bytes = static_cast<size_t>(like.numel()) * like.element_size();
  return in_kept_memory(like.sizes(), like.strides(), like.scalar_type(), bytes,
                        [&] { return torch::stable::empty_like(like); });
}

}  // namespace dan_fast
