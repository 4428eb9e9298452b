// The shim finds what it promises to find: each kernel below has one fault.
#include "cuda/device/simt/simt.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "cuda/launch.hpp"
#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda {
namespace {

using testing::HasSubstr;
using namespace simt;

constexpr int kThreads = 64;

// What the shim says of a kernel of one block; empty: nothing.
std::string problem_of(const std::function<void()>& body, std::size_t shared_bytes = 1024,
                       unsigned threads = kThreads) {
  return run({{1, 1, 1}, {threads, 1, 1}, shared_bytes}, body);
}

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

TEST(Simt, IndicesCoverTheGrid) {
  DeviceArray<int> hits(2 * 3 * 4 * 5);
  std::fill_n(hits.data(), hits.size(), 0);
  const std::string problem = run({{2, 3, 1}, {4, 5, 1}, 0}, [&] {
    const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
    const unsigned thread = threadIdx.x + blockDim.x * threadIdx.y;
    atomicAdd(hits.data() + block * blockDim.x * blockDim.y + thread, 1);
  });
  EXPECT_EQ(problem, "");
  EXPECT_EQ(hits.values(), std::vector<int>(hits.size(), 1));
}

TEST(Simt, BarriersOrderThreads) {
  DeviceArray<float> out(kThreads);
  const std::string problem = problem_of([&] {
    st_shared(shared_floats() + threadIdx.x, static_cast<float>(threadIdx.x));
    __syncthreads();
    st_global(out.data() + threadIdx.x, ld_shared(shared_floats() + (kThreads - 1 - threadIdx.x)));
  });
  EXPECT_EQ(problem, "");
  EXPECT_EQ(out[0], kThreads - 1);
  EXPECT_EQ(out[kThreads - 1], 0);
}

TEST(Simt, MissingBarrierIsARace) {
  const auto body = [](bool barrier) {
    return [barrier] {
      const int warp = threadIdx.x / 32;
      if (warp == 0) st_shared(shared_floats() + threadIdx.x, 1.0f);
      if (barrier) __syncthreads();
      if (warp == 1) ld_shared(shared_floats() + threadIdx.x - 32);
    };
  };
  EXPECT_EQ(problem_of(body(true)), "");
  // Either order of the warps is wrong, and each is found.
  EXPECT_THAT(problem_of(body(false)),
              testing::AnyOf(HasSubstr("race"), HasSubstr("before anything")));
}

TEST(Simt, WritingWhatOthersReadIsARace) {
  EXPECT_THAT(problem_of([] {
                if (threadIdx.x == 0) st_shared(shared_floats(), 1.0f);
                __syncthreads();
                ld_shared(shared_floats());
                if (threadIdx.x == kThreads - 1) st_shared(shared_floats(), 2.0f);
              }),
              HasSubstr("race"));
}

TEST(Simt, WarpBarrierOrdersAWarpOnly) {
  const auto body = [](int distance) {
    return [distance] {
      st_shared(shared_floats() + threadIdx.x, 1.0f);
      __syncwarp();
      ld_shared(shared_floats() + (threadIdx.x ^ distance));
    };
  };
  EXPECT_EQ(problem_of(body(1)), "");
  EXPECT_THAT(problem_of(body(32)),
              testing::AnyOf(HasSubstr("race"), HasSubstr("before anything")));
}

TEST(Simt, UnwrittenSharedMemory) {
  EXPECT_THAT(problem_of([] { ld_shared(shared_floats()); }),
              HasSubstr("before anything was written"));
}

TEST(Simt, SharedMemoryHasAnEnd) {
  EXPECT_EQ(problem_of([] { st_shared(shared_floats() + threadIdx.x, 0.0f); }, 4 * kThreads), "");
  EXPECT_THAT(problem_of([] { st_shared(shared_floats() + threadIdx.x, 0.0f); }, 4 * kThreads - 4),
              HasSubstr("at offset 252 of the 252 bytes of shared memory"));
}

TEST(Simt, GlobalMemoryHasAnEnd) {
  const DeviceArray<float> values(kThreads);
  EXPECT_EQ(problem_of([&] { st_global(values.data() + threadIdx.x, 1.0f); }), "");
  EXPECT_THAT(problem_of([&] { ld_global(values.data() + threadIdx.x + 1); }),
              HasSubstr("at offset 256 of an allocation of 256 bytes"));
  std::vector<float> host(kThreads);
  EXPECT_NE(problem_of([&] { ld_global(host.data() + threadIdx.x); }), "");
}

TEST(Simt, Alignment) {
  const DeviceArray<float> values(2 * kThreads);
  EXPECT_THAT(problem_of([&] { ld_global(reinterpret_cast<const uint4*>(values.data() + 1)); }),
              HasSubstr("not aligned to 16"));
  EXPECT_THAT(problem_of([] {
                st_shared(reinterpret_cast<uint2*>(shared_floats() + 1 + 2 * threadIdx.x), uint2{});
              }),
              HasSubstr("not aligned"));
  EXPECT_THAT(problem_of([&] { cp_async_16(shared_memory() + 8, values.data()); }),
              HasSubstr("not aligned"));
}

TEST(Simt, DivergentBarriers) {
  EXPECT_THAT(problem_of([] {
                if (threadIdx.x < 32) __syncthreads();
              }),
              HasSubstr("divergent barrier: 32 threads have left"));
  // Outside of a macro, where every line counts as one.
  const auto two_barriers = [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  };
  EXPECT_THAT(problem_of(two_barriers), HasSubstr("divergent barrier: threads wait at"));
}

TEST(Simt, WarpOperationsNeedAllTheirLanes) {
  EXPECT_THAT(problem_of([] {
                if (threadIdx.x != 5) __shfl_xor_sync(kFullMask, 1, 1);
              }),
              HasSubstr("lanes of its mask that never come"));
  EXPECT_THAT(problem_of([] { __shfl_xor_sync(kFullMask, 1, 1); }, 0, 48),
              HasSubstr("lanes of its mask that never come"));
  EXPECT_THAT(problem_of([] { __shfl_sync(0xFFFFu, 1, 0); }), HasSubstr("lacks the calling lane"));
  const auto two_operations = [] {
    if (threadIdx.x % 2 == 0) {
      __syncwarp();
    } else {
      __shfl_xor_sync(kFullMask, 1, 1);
    }
  };
  EXPECT_THAT(problem_of(two_operations), HasSubstr("different operations"));
}

TEST(Simt, Shuffles) {
  DeviceArray<int> out(3 * 32);
  EXPECT_EQ(problem_of(
                [&] {
                  const int lane = static_cast<int>(threadIdx.x);
                  st_global(out.data() + lane, __shfl_xor_sync(kFullMask, lane, 3));
                  st_global(out.data() + 32 + lane, __shfl_down_sync(kFullMask, lane, 30));
                  st_global(out.data() + 64 + lane,
                            static_cast<int>(__ballot_sync(kFullMask, lane >= 28) >> 28));
                },
                0, 32),
            "");
  EXPECT_EQ(out[4], 7);
  EXPECT_EQ(out[32 + 1], 31);
  EXPECT_EQ(out[32 + 2], 2);  // no such lane: its own
  EXPECT_EQ(out[64], 15);
}

TEST(Simt, AsynchronousCopiesAreWaitedFor) {
  const DeviceArray<float> source(std::vector<float>{1, 2, 3, 4});
  DeviceArray<float> out(1);
  const auto body = [&](bool wait, bool copy) {
    return [&, wait, copy] {
      cp_async_16(shared_memory(), source.data(), copy);
      cp_async_commit();
      if (wait) cp_async_wait<0>();
      st_global(out.data(), ld_shared(shared_floats() + 2));
    };
  };
  EXPECT_EQ(problem_of(body(true, true), 64, 1), "");
  EXPECT_EQ(out[0], 3);
  EXPECT_EQ(problem_of(body(true, false), 64, 1), "");
  EXPECT_EQ(out[0], 0);
  EXPECT_THAT(problem_of(body(false, true), 64, 1), HasSubstr("under way"));
}

TEST(Simt, ProductOfTensorCores) {
  // A[r][k] = r + k, B[k][c] = (k == c): D[r][c] = r + c for c < 8.
  DeviceArray<float> out(16 * 8);
  EXPECT_EQ(problem_of(
                [&] {
                  const int g = static_cast<int>(threadIdx.x) / 4,
                            t = static_cast<int>(threadIdx.x) % 4;
                  const auto a_pair = [](int row, int k) {
                    return pack2<F16>(static_cast<float>(row + k), static_cast<float>(row + k + 1));
                  };
                  const auto b_pair = [&](int k) {
                    return pack2<F16>(k == g ? 1.0f : 0.0f, k + 1 == g ? 1.0f : 0.0f);
                  };
                  const std::uint32_t a[4] = {a_pair(g, 2 * t), a_pair(g + 8, 2 * t),
                                              a_pair(g, 2 * t + 8), a_pair(g + 8, 2 * t + 8)};
                  const std::uint32_t b[2] = {b_pair(2 * t), b_pair(2 * t + 8)};
                  float d[4] = {100, 100, 100, 100};
                  mma_m16n8k16<F16>(d, a, b);
                  for (int r = 0; r < 4; ++r) {
                    st_global(out.data() + (g + r / 2 * 8) * 8 + 2 * t + r % 2, d[r]);
                  }
                },
                0, 32),
            "");
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) EXPECT_EQ(out[static_cast<std::size_t>(r * 8 + c)], 100 + r + c);
  }
}

TEST(Simt, PairsRoundOnce) {
  // 1 + 2^-11 * (1 + 2^-10) lies just above the middle of two halves: through float it would be a
  // tie.
  const std::uint32_t a = pack2<F16>(1.0f / 2048, 2.0f), b = pack2<F16>(1.0f + 1.0f / 1024, 3.0f);
  const std::uint32_t c = pack2<F16>(1.0f, 0.5f);
  const std::uint32_t d = F16::fma2(a, b, c);
  EXPECT_EQ(F16::to_float(static_cast<std::uint16_t>(d)), 1.0f + 1.0f / 1024);
  EXPECT_EQ(F16::to_float(static_cast<std::uint16_t>(d >> 16)), 6.5f);
  // The smallest subnormals keep their value.
  EXPECT_EQ(F16::to_float(3), 3 * 0x1p-24f);
  EXPECT_EQ((lop3<0xEA>(0x0F0Fu, 0x00FFu, 0x8000u)), (0x0F0Fu & 0x00FFu) | 0x8000u);
}

TEST(Simt, LaunchesReportWhatFailed) {
  EXPECT_THROW(
      {
        try {
          launch(+[](int) { ld_shared(shared_floats()); }, {dim3(1), dim3(32), 64}, nullptr, 1);
        } catch (const Failure& failure) {
          EXPECT_EQ(failure.status, Status::kCudaError);
          EXPECT_THAT(failure.what(), HasSubstr("before anything was written"));
          EXPECT_THAT(failure.what(), HasSubstr("launch.hpp"));
          throw;
        }
      },
      Failure);
}

}  // namespace
}  // namespace hqq::cuda
