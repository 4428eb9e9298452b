// Codes from one packing to the other.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"

namespace hqq::cuda {

// As in Api. Throw Failure.
void pack(const DeviceMatrix& format1, void* tiles, StreamHandle stream);
void unpack(const DeviceMatrix& tiles, std::uint8_t* W_q, std::int64_t row_bytes,
            StreamHandle stream);

}  // namespace hqq::cuda
