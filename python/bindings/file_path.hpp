// Paths that Python gives.
#pragma once

#include <pybind11/stl/filesystem.h>

#include "python/bindings/common.hpp"

namespace hqq::python {

// A str, bytes or os.PathLike. pybind11 calls one that no file can have an incompatible argument;
// as FilePath it is a std::invalid_argument that says so.
struct FilePath : std::filesystem::path {
  FilePath() = default;
  explicit FilePath(std::filesystem::path path) : std::filesystem::path(std::move(path)) {}
};

}  // namespace hqq::python

namespace pybind11::detail {

template <>
struct type_caster<hqq::python::FilePath> {
  PYBIND11_TYPE_CASTER(hqq::python::FilePath, make_caster<std::filesystem::path>::name);
  bool load(handle source, bool convert) {
    make_caster<std::filesystem::path> path;
    if (path.load(source, convert)) {
      value = hqq::python::FilePath(cast_op<std::filesystem::path&>(path));
      return true;
    }
    const auto text = reinterpret_steal<object>(PyOS_FSPath(source.ptr()));
    if (!text) {
      PyErr_Clear();
      return false;
    }
    const auto repr = reinterpret_steal<object>(PyObject_ASCII(text.ptr()));
    if (!repr) throw error_already_set();
    hqq::throw_invalid("path", hqq::cut_text(repr.cast<std::string>(), 100) +
                                   " cannot be the name of a file: it has a NUL, or a character "
                                   "that the file system cannot hold");
  }
};

}  // namespace pybind11::detail
