// The extension module hqq_cpp._core.
#include <iostream>

#include "hqq/version.hpp"
#include "python/bindings/common.hpp"
#include "src/cli/cli.hpp"

namespace hqq::python {
namespace {

#define HQQ_STRINGIZE_(x) #x
#define HQQ_STRINGIZE(x) HQQ_STRINGIZE_(x)
constexpr const char* kPybind11Version =
    HQQ_STRINGIZE(PYBIND11_VERSION_MAJOR) "." HQQ_STRINGIZE(PYBIND11_VERSION_MINOR);

cli::Hooks::Outcome write_qmodel(const std::string& folder) {
  const py::gil_scoped_acquire acquire;
  const py::object module = py::module_::import("hqq_cpp._cli");
  const auto result =
      module.attr("write_qmodel")(py::str(folder)).cast<std::pair<int, std::string>>();
  return {result.first, result.second};
}

int cli_main(const std::vector<std::string>& argv) {
  std::vector<const char*> pointers;
  for (const std::string& argument : argv) pointers.push_back(argument.c_str());
  const py::gil_scoped_release release;
  const int code = cli::run(static_cast<int>(pointers.size()), pointers.data(), std::cout,
                            std::cerr, {.write_qmodel = &write_qmodel});
  std::cout.flush();
  std::cerr.flush();
  return code;
}

}  // namespace

void bind_cli(py::module_& m) {
  m.def("cli_main", &cli_main, py::arg("argv"),
        "Runs the command hqq-cpp with argv (argv[0] is its name); returns the exit code.");
}

}  // namespace hqq::python

PYBIND11_MODULE(_core, m) {
  namespace bindings = hqq::python;
  m.doc() = "The C++ part of hqq_cpp. Import hqq_cpp instead.";
  m.attr("__version__") = hqq::kVersion;
  m.attr("FORMAT_VERSION") = hqq::kFormatVersion;
  m.attr("_pybind11_version") = bindings::kPybind11Version;
  bindings::bind_error(m);
  bindings::bind_json(m);
  bindings::bind_device(m);
  bindings::bind_tensor(m);
  bindings::bind_layer_config(m);
  bindings::bind_config(m);
  bindings::bind_format(m);
  bindings::bind_quantized_tensor(m);
  bindings::bind_tiled_tensor(m);
  bindings::bind_quantizer(m);
  bindings::bind_roles(m);
  bindings::bind_linear(m);
  bindings::bind_cuda(m);
  bindings::bind_safetensors(m);
  bindings::bind_checkpoint(m);
  bindings::bind_checkpoint_operations(m);
  bindings::bind_upstream(m);
  bindings::bind_cli(m);
}
