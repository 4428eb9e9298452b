// Everything but hqq/eigen.hpp, which needs Eigen.
#pragma once

#include "hqq/bit_width.hpp"
#include "hqq/bitpack.hpp"
#include "hqq/checkpoint.hpp"
#include "hqq/config.hpp"
#include "hqq/device.hpp"
#include "hqq/dtype.hpp"
#include "hqq/error.hpp"
#include "hqq/linear.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/safetensors.hpp"
#include "hqq/tensor.hpp"
#include "hqq/tiled_tensor.hpp"
#include "hqq/version.hpp"
