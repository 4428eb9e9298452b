// quantize_checkpoint and its kin: include/hqq/checkpoint.hpp. Their docstrings are in
// hqq_cpp/checkpoints.py.
#include "hqq/checkpoint.hpp"
#include "python/bindings/file_path.hpp"
#include "python/bindings/plain.hpp"
#include "python/bindings/progress.hpp"
#include "src/io/checkpoint/quantized_source.hpp"

namespace hqq::python {
namespace {

using Path = FilePath;

constexpr const char* kProgressDoc =
    R"doc(What a long operation is at; given to ``progress`` callbacks.

Called in the thread that started the operation, about ten times a second at most and once at the
end.

Example:
    >>> seen = []
    >>> report = hqq_cpp.verify_checkpoint(model, progress=seen.append)
    >>> seen[-1].done == seen[-1].total
    True
)doc";

constexpr const char* kLayerReportDoc = R"doc(What was done with one layer.

Example:
    >>> report = hqq_cpp.quantize_checkpoint(model, folder / "unused", {"nbits": 2}, dry_run=True)
    >>> report.layers[0].config.nbits
    2
)doc";

constexpr const char* kQuantizeReportDoc = R"doc(What quantize_checkpoint did.

Example:
    >>> report = hqq_cpp.quantize_checkpoint(model, folder / "unused", {"nbits": 2}, dry_run=True)
    >>> report.bytes_after < report.bytes_before
    True
)doc";

constexpr const char* kVerifyReportDoc = R"doc(What verify_checkpoint found.

Example:
    >>> report = hqq_cpp.verify_checkpoint(model)  # not one of ours
    >>> report.ok, report.problems[-1]
    (False, 'no shard describes a quantized layer')
)doc";

constexpr const char* kTensorDiffDoc = R"doc(How one tensor differs between two checkpoints.

Example:
    >>> diff = hqq_cpp.diff_checkpoints(model, model)[0]
    >>> diff.identical, diff.max_abs
    (True, 0.0)
)doc";

void bind_results(py::module_& m) {
  PlainClass<Progress>(m, "Progress", kProgressDoc)
      .field("stage", &Progress::stage, "'quantize', 'verify', ...")
      .field("current", &Progress::current, "Tensor or file at work.")
      .field("done", &Progress::done, "Weights (or bytes, for verify and copies) so far.")
      .field("total", &Progress::total, "Weights or bytes in all.")
      .field("seconds", &Progress::seconds, "Since the start.");
  PlainClass<LayerReport>(m, "LayerReport", kLayerReportDoc)
      .field("name", &LayerReport::name, "Full name, without '.weight'.")
      .field("tag", &LayerReport::tag, "See layer_tag.")
      .field("config", &LayerReport::config, "The LayerConfig of the layer.")
      .field(
          "shape", [](const LayerReport& r) -> Shape { return shape_to_python(r.shape); },
          "[out_features, in_features], or [experts, out_features, in_features].")
      .field("bytes_before", &LayerReport::bytes_before, "Of the dense weight.")
      .field("bytes_after", &LayerReport::bytes_after, "Of the quantized one.")
      .field("stats", &LayerReport::stats, "Errors; zeros after a dry run.");
  PlainClass<QuantizeReport>(m, "QuantizeReport", kQuantizeReportDoc)
      .field("layers", &QuantizeReport::layers, "The quantized layers.")
      .field("copied", &QuantizeReport::copied, "Matrices that were left as they are.")
      .field("warnings", &QuantizeReport::warnings,
             "A sentence each: names that fit no layer, weights left out.")
      .field("bytes_before", &QuantizeReport::bytes_before, "Of all tensors.")
      .field("bytes_after", &QuantizeReport::bytes_after, "Of all tensors.")
      .field("weights", &QuantizeReport::weights, "How many were quantized.")
      .field("bits_per_weight", &QuantizeReport::bits_per_weight,
             "Of the quantized layers, metadata included.")
      .field("seconds", &QuantizeReport::seconds, "The whole operation.");
  PlainClass<VerifyReport> verify(m, "VerifyReport", kVerifyReportDoc);
  verify.field("problems", &VerifyReport::problems, "One sentence each; empty: all is well.")
      .field("files", &VerifyReport::files, "Files checked.")
      .field("layers", &VerifyReport::layers, "Quantized layers checked.")
      .field("bytes", &VerifyReport::bytes, "Bytes read.");
  verify.bound().def_property_readonly(
      "ok", [](const VerifyReport& r) { return r.problems.empty(); }, "True without problems.");
  PlainClass<TensorDiff>(m, "TensorDiff", kTensorDiffDoc)
      .field("name", &TensorDiff::name, "Tensor, or quantized layer.")
      .field("mean_abs", &TensorDiff::mean_abs, "mean |A - B|.")
      .field("rms", &TensorDiff::rms, "sqrt(mean (A - B)^2).")
      .field("max_abs", &TensorDiff::max_abs, "max |A - B|.")
      .field("relative", &TensorDiff::relative, "||A - B|| / ||A||.")
      .field("identical", &TensorDiff::identical, "All values are equal.")
      .field("note", &TensorDiff::note, "'only in A', 'shapes differ: ...', or empty.");
}

QuantizeReport quantize(const Path& source, const Path& destination, const py::object& config,
                        const Path& importance, int threads, bool force, bool resume, bool dry_run,
                        const Text& device, bool follow_links, const py::object& progress) {
  const HqqConfig settings = config_from_python(config);
  QuantizeCheckpointOptions options;
  options.threads = threads;
  options.device = Device::parse(device);
  options.dry_run = dry_run;
  options.force = force;
  options.resume = resume;
  options.importance = importance;
  options.follow_links = follow_links;
  QuantizeReport report;
  run_with_progress(progress, [&](const ProgressCallback& callback) {
    options.progress = callback;
    report = quantize_checkpoint(source, destination, settings, options);
  });
  return report;
}

CheckpointOptions make_options(int threads, bool force, const ProgressCallback& callback,
                               bool follow_links = false) {
  CheckpointOptions options;
  options.threads = threads;
  options.force = force;
  options.progress = callback;
  options.follow_links = follow_links;
  return options;
}

void dequantize(const Path& source, const Path& destination, const py::object& dtype, int threads,
                bool force, bool follow_links, const py::object& progress) {
  const DType type =
      dtype_from_python(dtype, "dequantize", "float32, float16, bfloat16 or float64");
  run_with_progress(progress, [&](const ProgressCallback& callback) {
    dequantize_checkpoint(source, destination, type,
                          make_options(threads, force, callback, follow_links));
  });
}

void convert(const Path& source, const Path& destination, const Text& to, int threads, bool force,
             bool follow_links, const py::object& progress) {
  const CheckpointFormat format = checkpoint_format_from_string(to);
  run_with_progress(progress, [&](const ProgressCallback& callback) {
    convert_checkpoint(source, destination, format,
                       make_options(threads, force, callback, follow_links));
  });
}

VerifyReport verify(const Path& path, int threads, const py::object& progress) {
  VerifyReport report;
  run_with_progress(progress, [&](const ProgressCallback& callback) {
    report = verify_checkpoint(path, make_options(threads, false, callback));
  });
  return report;
}

std::vector<TensorDiff> diff(const Path& a, const Path& b, int threads,
                             const py::object& progress) {
  std::vector<TensorDiff> result;
  run_with_progress(progress, [&](const ProgressCallback& callback) {
    result = diff_checkpoints(a, b, make_options(threads, false, callback));
  });
  return result;
}

}  // namespace

void bind_checkpoint_operations(py::module_& m) {
  bind_results(m);
  m.def("quantize_checkpoint", &quantize, py::arg("src"), py::arg("dst"), py::arg("config"),
        py::arg("importance"), py::arg("threads"), py::arg("force"), py::arg("resume"),
        py::arg("dry_run"), py::arg("device"), py::arg("follow_links"), py::arg("progress"),
        "See hqq_cpp.quantize_checkpoint.");
  m.def("dequantize_checkpoint", &dequantize, py::arg("src"), py::arg("dst"), py::arg("dtype"),
        py::arg("threads"), py::arg("force"), py::arg("follow_links"), py::arg("progress"),
        "See hqq_cpp.dequantize_checkpoint.");
  m.def("convert_checkpoint", &convert, py::arg("src"), py::arg("dst"), py::arg("to"),
        py::arg("threads"), py::arg("force"), py::arg("follow_links"), py::arg("progress"),
        "See hqq_cpp.convert_checkpoint.");
  m.def("verify_checkpoint", &verify, py::arg("path"), py::arg("threads"), py::arg("progress"),
        "See hqq_cpp.verify_checkpoint.");
  m.def(
      "find_quantization",
      [](const std::vector<Path>& files) {
        const py::gil_scoped_release release;
        return find_quantization(std::vector<std::filesystem::path>(files.begin(), files.end()));
      },
      py::arg("files"),
      "What says that weight files, or the folder they are in, are quantized already; None if "
      "nothing does.");
  m.def("diff_checkpoints", &diff, py::arg("a"), py::arg("b"), py::arg("threads"),
        py::arg("progress"), "See hqq_cpp.diff_checkpoints.");
}

}  // namespace hqq::python
