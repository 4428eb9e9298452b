// Exceptions: include/hqq/error.hpp -> hqq_cpp/errors.py.
#include <filesystem>
#include <system_error>

#include "python/bindings/common.hpp"

namespace hqq::python {
namespace {

void set_error(const char* type, const std::exception& error) {
  py::set_error(py::module_::import("hqq_cpp.errors").attr(type), error.what());
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

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const FormatError& error) {
    set_error("FormatError", error);
  } catch (const CudaError& error) {
    set_error("CudaError", error);
  } catch (const Interrupted& error) {
    set_error("Interrupted", error);
  } catch (const std::filesystem::filesystem_error& error) {
    set_os_error(error.code().value(), error.what(), error.path1().string());
  } catch (const std::system_error& error) {
    set_os_error(error.code().value(), error.what(), quoted_file(error.what()));
  }
}

}  // namespace

void bind_error(py::module_&) { py::register_local_exception_translator(&translate); }

}  // namespace hqq::python
