// Exceptions: include/hqq/error.hpp.
#include <filesystem>
#include <system_error>

#include "python/bindings/common.hpp"

namespace hqq::python {
namespace {

constexpr const char* kFormatErrorDoc =
    "A file or a set of tensors breaks its format. A subclass of ValueError.";
constexpr const char* kCudaErrorDoc =
    "A CUDA call failed, or the library was built without CUDA. A subclass of RuntimeError.";
constexpr const char* kInterruptedDoc =
    "A progress callback returned False: the work was stopped. A subclass of RuntimeError.";

template <class Error>
void register_error(py::module_& m, const char* name, PyObject* base, const char* doc) {
  auto type = py::register_exception<Error>(m, name, base);
  // The name that users import and tracebacks print.
  type.attr("__module__") = "hqq_cpp";
  type.attr("__doc__") = doc;
}

void set_os_error(int code, const std::string& message, const std::string& file) {
  // OSError picks the subclass (FileNotFoundError, ...) by errno.
  py::object arguments = py::make_tuple(code, message);
  if (!file.empty()) arguments = py::make_tuple(code, message, file);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

// The file a message of ours names: [where] cannot open "FILE": No such file or directory.
std::string quoted_file(const std::string& message) {
  const std::size_t begin = message.find('"');
  const std::size_t end = message.rfind('"');
  if (begin == std::string::npos || end == begin) return {};
  const std::string file = message.substr(begin + 1, end - begin - 1);
  // An escaped or shortened name is for reading only.
  if (file.find('\\') != std::string::npos || file.find("...") != std::string::npos) return {};
  return file;
}

// What the system says about `code` stands at the end of what() and again in str(OSError).
void translate_system_error(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const std::filesystem::filesystem_error& error) {
    set_os_error(error.code().value(), error.what(), error.path1().string());
  } catch (const std::system_error& error) {
    set_os_error(error.code().value(), error.what(), quoted_file(error.what()));
  }
}

}  // namespace

void bind_error(py::module_& m) {
  py::register_local_exception_translator(&translate_system_error);
  register_error<FormatError>(m, "FormatError", PyExc_ValueError, kFormatErrorDoc);
  register_error<CudaError>(m, "CudaError", PyExc_RuntimeError, kCudaErrorDoc);
  register_error<Interrupted>(m, "Interrupted", PyExc_RuntimeError, kInterruptedDoc);
}

}  // namespace hqq::python
