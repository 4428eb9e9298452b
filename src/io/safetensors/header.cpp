#include "src/io/safetensors/header.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "hqq/error.hpp"
#include "src/base/json.hpp"

namespace hqq {
namespace {

constexpr const char* kSafetensorsWhere = "safetensors";
constexpr std::uint64_t kMaxDimension = std::numeric_limits<std::int64_t>::max();

std::string number(std::uint64_t value) { return std::to_string(value); }

// Builds tensor entries straight from the events of the parser. Anything an entry cannot hold is
// refused at once, so hostile nesting never goes deeper than the three levels of the format.
class HeaderHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderHandler(SafetensorsHeader& header, const std::string& file)
      : header_(header), file_(file) {}

  bool null() override { unexpected("null"); }
  bool boolean(bool value) override { unexpected(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override {
    // Only numbers with a minus sign come here.
    if (in_list()) {
      fail("the " + list_name() + " of tensor " + quote_text(tensor_.name) + " hold " +
           (value == 0 ? "-0" : std::to_string(value)) + ", which is negative");
    }
    unexpected("a number");
  }
  bool number_float(number_float_t, const string_t& text) override {
    if (in_list()) {
      fail("the " + list_name() + " of tensor " + quote_text(tensor_.name) + " hold " +
           text.substr(0, 40) + ", which is no integer below 2^63");
    }
    unexpected("a number");
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (!in_list()) unexpected("a number");
    if (value > kMaxDimension) {
      fail("the " + list_name() + " of tensor " + quote_text(tensor_.name) + " hold " +
           number(value) + ", which is no integer below 2^63");
    }
    if (state_ == State::kShape) {
      tensor_.shape.push_back(static_cast<std::int64_t>(value));
    } else {
      if (offsets_ == 2) bad_offset_count();
      (offsets_ == 0 ? tensor_.begin : tensor_.end) = value;
      ++offsets_;
    }
    return true;
  }
  bool string(string_t& text) override {
    if (state_ == State::kMetadata) {
      if (!header_.metadata.emplace(std::move(metadata_key_), std::move(text)).second) {
        fail("__metadata__ has the key " + quote_text(last_key_) + " twice");
      }
      return true;
    }
    if (state_ == State::kTensor && field_ == Field::kDtype) {
      const auto dtype = dtype_from_safetensors_name(text);
      if (!dtype) {
        fail("tensor " + quote_text(tensor_.name) + " has the unknown dtype " + quote_text(text));
      }
      tensor_.dtype = *dtype;
      return true;
    }
    unexpected("a string");
  }
  bool binary(binary_t&) override { unexpected("binary"); }

  bool start_object(std::size_t) override {
    if (state_ == State::kStart) {
      state_ = State::kTop;
    } else if (state_ == State::kTop && last_key_ == kMetadataKey) {
      if (std::exchange(has_metadata_, true)) fail("__metadata__ appears twice");
      state_ = State::kMetadata;
    } else if (state_ == State::kTop) {
      tensor_ = {};
      tensor_.name = last_key_;
      seen_ = 0;
      state_ = State::kTensor;
    } else {
      unexpected("an object");
    }
    return true;
  }
  bool key(string_t& text) override {
    last_key_ = text;
    if (state_ == State::kMetadata) metadata_key_ = text;
    if (state_ == State::kTensor) start_field(text);
    return true;
  }
  bool end_object() override {
    if (state_ == State::kTensor) {
      for (const Field field : {Field::kDtype, Field::kShape, Field::kOffsets}) {
        if ((seen_ & bit(field)) == 0) {
          fail("tensor " + quote_text(tensor_.name) + " has no " + field_name(field));
        }
      }
      header_.tensors.push_back(std::move(tensor_));
    }
    // After the outermost object the parser accepts no further value.
    state_ = State::kTop;
    return true;
  }
  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && field_ == Field::kShape) {
      state_ = State::kShape;
    } else if (state_ == State::kTensor && field_ == Field::kOffsets) {
      state_ = State::kOffsets;
      offsets_ = 0;
    } else {
      unexpected("an array");
    }
    return true;
  }
  bool end_array() override {
    if (state_ == State::kOffsets && offsets_ != 2) bad_offset_count();
    state_ = State::kTensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    fail("the header is not JSON at byte " + number(position) +
         " of it: " + json_error_reason(error.what()));
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw_format(kSafetensorsWhere, file_ + ": " + message);
  }

  static constexpr std::string_view kMetadataKey = "__metadata__";

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kShape, kOffsets };
  enum class Field { kDtype, kShape, kOffsets };

  static unsigned bit(Field field) { return 1u << static_cast<unsigned>(field); }
  static const char* field_name(Field field) {
    return field == Field::kDtype ? "dtype" : field == Field::kShape ? "shape" : "data_offsets";
  }
  bool in_list() const { return state_ == State::kShape || state_ == State::kOffsets; }
  std::string list_name() const {
    return state_ == State::kShape ? "dimensions in shape" : "data_offsets";
  }

  void start_field(const std::string& name) {
    if (name == "dtype") {
      field_ = Field::kDtype;
    } else if (name == "shape") {
      field_ = Field::kShape;
    } else if (name == "data_offsets") {
      field_ = Field::kOffsets;
    } else {
      fail("tensor " + quote_text(tensor_.name) + " has the unknown field " + quote_text(name) +
           "; known are dtype, shape, data_offsets");
    }
    if ((seen_ & bit(field_)) != 0) {
      fail("tensor " + quote_text(tensor_.name) + " has the field " + field_name(field_) +
           " twice");
    }
    seen_ |= bit(field_);
  }
  [[noreturn]] void bad_offset_count() const {
    fail("tensor " + quote_text(tensor_.name) +
         " must have exactly two data_offsets, begin and end");
  }
  [[noreturn]] void unexpected(const std::string& found) const {
    switch (state_) {
      case State::kStart:
        fail("the header must be a JSON object, but it is " + found);
      case State::kTop:
        fail("the entry " + quote_text(last_key_) + " must be an object, but it is " + found);
      case State::kMetadata:
        fail("__metadata__ must map strings to strings, but " + quote_text(last_key_) + " is " +
             found);
      case State::kTensor:
        fail(std::string(field_name(field_)) + " of tensor " + quote_text(tensor_.name) +
             (field_ == Field::kDtype ? " must be a string" : " must be an array") +
             ", but it is " + found);
      default:
        fail("the " + list_name() + " of tensor " + quote_text(tensor_.name) +
             " must be integers, but one is " + found);
    }
  }

  SafetensorsHeader& header_;
  const std::string& file_;
  State state_ = State::kStart;
  Field field_ = Field::kDtype;
  unsigned seen_ = 0;
  int offsets_ = 0;
  bool has_metadata_ = false;
  std::string last_key_;
  std::string metadata_key_;
  TensorInfo tensor_;
};

// Bytes of a tensor of this shape; nullopt when they do not fit into 64 bits.
std::optional<std::uint64_t> checked_nbytes(const TensorInfo& info) {
  std::uint64_t product = 1;
  for (const std::int64_t dimension : info.shape) {
    const auto size = static_cast<std::uint64_t>(dimension);
    if (size != 0 && product > kMaxDimension / size) return std::nullopt;
    product *= size;
  }
  const std::uint64_t element = dtype_size(info.dtype);
  if (product > kMaxDimension / element) return std::nullopt;
  return product * element;
}

void check_names(const std::vector<TensorInfo>& tensors, const HeaderHandler& handler) {
  std::unordered_set<std::string_view> names;
  for (const TensorInfo& info : tensors) {
    if (!names.insert(info.name).second) {
      handler.fail("tensor " + quote_text(info.name) + " appears twice");
    }
  }
}

// By place in the file; empty tensors at the same place keep the order of the header. Not by
// std::stable_sort, which in GCC 12's library calls what that library marks as deprecated.
std::vector<TensorInfo> in_file_order(std::vector<TensorInfo> tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tuple(tensors[a].begin, tensors[a].end, a) <
           std::tuple(tensors[b].begin, tensors[b].end, b);
  });
  std::vector<TensorInfo> sorted;
  sorted.reserve(order.size());
  for (const std::size_t i : order) sorted.push_back(std::move(tensors[i]));
  return sorted;
}

// The tensors, sorted, must follow each other from byte 0 to the last one without a gap.
void check_tiling(const std::vector<TensorInfo>& tensors, std::uint64_t data_size,
                  const HeaderHandler& handler) {
  std::uint64_t position = 0;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& info : tensors) {
    if (info.begin < position) {
      handler.fail("tensor " + quote_text(info.name) + " begins at byte " + number(info.begin) +
                   ", inside tensor " + quote_text(previous->name) + ", which ends at byte " +
                   number(position));
    }
    if (info.begin > position) {
      handler.fail("bytes " + number(position) + " to " + number(info.begin) +
                   " of the data belong to no tensor (hole before " + quote_text(info.name) + ")");
    }
    position = info.end;
    previous = &info;
  }
  if (position != data_size) {
    handler.fail("the tensors end at byte " + number(position) + " of the data, but " +
                 number(data_size - position) + " more bytes follow");
  }
}

void check_tensor(const TensorInfo& info, std::uint64_t data_size, const HeaderHandler& handler) {
  const std::string name = "tensor " + quote_text(info.name);
  if (info.end < info.begin) {
    handler.fail(name + " ends at byte " + number(info.end) + ", before it begins at byte " +
                 number(info.begin));
  }
  const auto nbytes = checked_nbytes(info);
  const std::string type =
      std::string(safetensors_name(info.dtype)) + " " + shape_string(info.shape).substr(0, 200);
  if (!nbytes) handler.fail(name + " (" + type + ") has more than 2^63 bytes");
  if (info.nbytes() != *nbytes) {
    handler.fail(name + " (" + type + ") takes " + number(*nbytes) +
                 " bytes, but its data_offsets span " + number(info.nbytes()));
  }
  if (info.end > data_size) {
    handler.fail(name + " ends at byte " + number(info.end) + ", but the data has only " +
                 number(data_size) + " bytes");
  }
}

}  // namespace

std::uint64_t parse_header_length(std::span<const std::byte> prefix, std::uint64_t file_size,
                                  const std::string& file) {
  if (file_size == 0) throw_format(kSafetensorsWhere, file + ": the file is empty");
  if (file_size < kHeaderLengthBytes || prefix.size() < kHeaderLengthBytes) {
    throw_format(kSafetensorsWhere, file + ": the file has " + number(file_size) +
                                        " bytes, too few for the 8 bytes of the header length");
  }
  std::uint64_t length = 0;
  for (std::size_t i = kHeaderLengthBytes; i-- > 0;) {
    length = length << 8 | std::to_integer<std::uint64_t>(prefix[i]);
  }
  if (length > kMaxHeaderBytes) {
    throw_format(kSafetensorsWhere, file + ": the header claims " + number(length) +
                                        " bytes, more than the limit of " +
                                        number(kMaxHeaderBytes));
  }
  if (length > file_size - kHeaderLengthBytes) {
    throw_format(kSafetensorsWhere,
                 file + ": the header claims " + number(length) + " bytes, but only " +
                     number(file_size - kHeaderLengthBytes) + " follow its length");
  }
  if (length < 2) {
    throw_format(kSafetensorsWhere,
                 file + ": the header has " + number(length) + " bytes, but {} alone takes 2");
  }
  return length;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t data_size,
                                           const std::string& file) {
  SafetensorsHeader header;
  HeaderHandler handler(header, file);
  if (text.empty() || text[0] != '{') {
    handler.fail("the header must start with '{', but it starts with " +
                 quote_text(text.substr(0, 1)));
  }
  // The lexer would take a NUL for the end and ignore what follows.
  if (const auto nul = text.find('\0'); nul != std::string_view::npos) {
    handler.fail("the header has a NUL at byte " + number(nul) + " of it");
  }
  nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &handler);

  check_names(header.tensors, handler);
  for (const TensorInfo& info : header.tensors) check_tensor(info, data_size, handler);
  header.tensors = in_file_order(std::move(header.tensors));
  check_tiling(header.tensors, data_size, handler);
  return header;
}

std::uint64_t assign_offsets(std::vector<TensorInfo>& tensors, const std::string& file) {
  std::unordered_set<std::string_view> names;
  std::uint64_t position = 0;
  for (TensorInfo& info : tensors) {
    const std::string name = file + ": tensor " + quote_text(info.name);
    if (info.name == HeaderHandler::kMetadataKey) {
      throw_invalid(kSafetensorsWhere, file + ": the name __metadata__ is reserved");
    }
    if (!names.insert(info.name).second) throw_invalid(kSafetensorsWhere, name + " is given twice");
    checked_numel(info.shape, kSafetensorsWhere + (" " + name));
    const auto nbytes = checked_nbytes(info);
    if (!nbytes || *nbytes > kMaxDimension - position) {
      throw_invalid(kSafetensorsWhere, name + " " + shape_string(info.shape) +
                                           " makes the file larger than 2^63 bytes");
    }
    info.begin = position;
    position += *nbytes;
    info.end = position;
  }
  return position;
}

std::string format_safetensors_header(const std::vector<TensorInfo>& tensors,
                                      const std::map<std::string, std::string>& metadata,
                                      const std::string& file) {
  using nlohmann::json;
  std::string text(kHeaderLengthBytes, '\0');
  text += '{';
  try {
    if (!metadata.empty()) {
      text += json(HeaderHandler::kMetadataKey).dump() + ":" + json(metadata).dump();
    }
    for (const TensorInfo& info : tensors) {
      if (text.back() != '{') text += ',';
      text += json(info.name).dump() + ":{\"dtype\":\"";
      text += safetensors_name(info.dtype);
      text += "\",\"shape\":" + json(info.shape).dump() + ",\"data_offsets\":[" +
              number(info.begin) + "," + number(info.end) + "]}";
    }
  } catch (const json::exception& error) {
    throw_invalid(kSafetensorsWhere,
                  file + ": a name or metadata is not UTF-8: " + json_error_reason(error.what()));
  }
  text += '}';
  // Readers that map the file rely on this alignment.
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t length = text.size() - kHeaderLengthBytes;
  if (length > kMaxHeaderBytes) {
    throw_invalid(kSafetensorsWhere, file + ": the header takes " + number(length) +
                                         " bytes, more than the limit of " +
                                         number(kMaxHeaderBytes));
  }
  for (std::size_t i = 0; i < kHeaderLengthBytes; ++i) {
    text[i] = static_cast<char>(length >> (8 * i) & 0xFF);
  }
  return text;
}

}  // namespace hqq
