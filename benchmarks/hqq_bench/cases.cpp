#include "benchmarks/hqq_bench/cases.hpp"

#include <sstream>
#include <utility>

#include "src/backend.hpp"

namespace hqq::bench {

std::vector<Device> devices() {
  std::vector<Device> found = {Device::cpu()};
  if (cuda::is_available()) found.push_back(Device::cuda());
  return found;
}

std::string case_name(const std::string& operation, const Device& device, const LayerConfig& config,
                      const std::vector<std::string>& details, std::int64_t size) {
  std::ostringstream name;
  name << operation << "/" << device.str() << "/" << nbits_of(config.nbits) << "bit/axis"
       << config.axis;
  for (const std::string& detail : details) name << "/" << detail;
  name << "/" << size << "x" << size;
  return name.str();
}

void add_case(const std::string& name, std::function<void(benchmark::State&)> run) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(run))
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

void for_each_layout(const std::function<void(const LayerConfig&)>& visit) {
  LayerConfig config;
  config.solver = Solver::kMinMax;
  config.balance = Balance::kNone;
  for (const BitWidth nbits : kAllBitWidths) {
    for (const int axis : {1, 0}) {
      config.nbits = nbits;
      config.axis = axis;
      visit(config);
    }
  }
}

void set_rates(benchmark::State& state, std::int64_t weights, std::int64_t packed_bytes) {
  const auto rate = [](std::int64_t amount) {
    return benchmark::Counter(static_cast<double>(amount),
                              benchmark::Counter::kIsIterationInvariantRate);
  };
  state.counters["weights/s"] = rate(weights);
  state.counters["packed_bytes/s"] = rate(packed_bytes);
}

void set_rates(benchmark::State& state, const PackedMatrix& q) {
  set_rates(state, q.out_features * q.in_features, q.nbytes());
}

}  // namespace hqq::bench
