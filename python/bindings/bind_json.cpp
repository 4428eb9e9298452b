// JSON from outside: src/base/json.hpp.
#include "python/bindings/file_path.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"

namespace hqq::python {
namespace {

constexpr const char* kParseDoc = R"doc(Reads a JSON text, with the limits of docs/cli.md.

Args:
    text: One document.
    where: What messages begin with.

Raises:
    FormatError: If it is no JSON, or has a duplicate key, or exceeds a limit.

Example:
    >>> hqq_cpp._core.parse_json('{"a": [1, null]}', "example")
    {'a': [1, None]}
)doc";

constexpr const char* kReadDoc = R"doc(Reads a JSON file that Python wrote, such as an index.

Args:
    path: A regular file; NaN and numbers beyond a double in it become None.

Raises:
    FormatError: As parse_json, and for a folder, a pipe or a device.
    OSError: If it cannot be read.
)doc";

py::object read_file(const FilePath& path) {
  return json_to_python(parse_python_json(read_text_file(path), quote_text(path.string())));
}

}  // namespace

void bind_json(py::module_& m) {
  m.def(
      "parse_json",
      [](const Text& text, const Text& where) { return json_to_python(parse_json(text, where)); },
      py::arg("text"), py::arg("where"), kParseDoc);
  m.def("read_json_file", &read_file, py::arg("path"), kReadDoc);
}

}  // namespace hqq::python
