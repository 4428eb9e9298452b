// All kernels, templates over the struct Isa that comes before. Included inside the namespace of an
// instruction set.

// clang-format off: the order matters.
#include "src/cpu/linear/fields-inl.hpp"
#ifndef HQQ_NO_DECODE
#include "src/cpu/linear/decode-inl.hpp"
#endif
#include "src/cpu/linear/panel-inl.hpp"
#include "src/cpu/linear/activations-inl.hpp"
#include "src/cpu/linear/table-inl.hpp"
// clang-format on
