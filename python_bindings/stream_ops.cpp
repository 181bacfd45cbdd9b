// torch.ops.dan_fast on the CPU: one pass over a memory, and which instruction set it takes.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../csrc/cpu/isa.h"

namespace {

std::string instruction_set() { return dan_fast::isa_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dan_fast, m) { m.def("instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dan_fast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
