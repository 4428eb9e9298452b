// All kernels, templates over the struct Isa that comes before. Included inside the namespace of an
// instruction set.

// clang-format off: the order matters.
#include "src/cpu/linear/kernels/fields-inl.hpp"
#ifndef HQQ_NO_DECODE
#include "src/cpu/linear/kernels/decode-inl.hpp"
#endif
#include "src/cpu/linear/kernels/panel-inl.hpp"
#include "src/cpu/linear/kernels/activations-inl.hpp"
#include "src/cpu/linear/kernels/table-inl.hpp"
// clang-format on
