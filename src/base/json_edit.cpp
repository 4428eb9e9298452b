#include "src/base/json_edit.hpp"

#include <algorithm>
#include <span>

#include "hqq/error.hpp"
#include "src/base/json.hpp"

namespace hqq {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kSpace = " \t\r\n";

// Where a member is in the text of its object.
struct Member {
  std::string key;
  std::size_t key_begin = 0, value_begin = 0, value_end = 0;
};

// All below read text that was parsed before, so that a value is where one is expected.

std::size_t skip_space(std::string_view text, std::size_t at) {
  return std::min(text.find_first_not_of(kSpace, at), text.size());
}

std::size_t value_end(std::string_view text, std::size_t at) {
  int depth = 0;
  do {
    const char c = text[at];
    if (c == '"') {
      at = json_string_end(text, at);
    } else if (depth == 0 && c != '{' && c != '[') {
      return std::min(text.find_first_of(" \t\r\n,]}", at), text.size());
    } else {
      if (c == '{' || c == '[') ++depth;
      if (c == '}' || c == ']') --depth;
      ++at;
    }
  } while (depth > 0 && at < text.size());
  return at;
}

std::vector<Member> members_of(std::string_view object) {
  std::vector<Member> members;
  std::size_t at = skip_space(object, skip_space(object, 0) + 1);
  while (at < object.size() && object[at] == '"') {
    Member member;
    member.key_begin = at;
    at = json_string_end(object, at);
    // Keys may be written with escapes.
    const std::string_view key = object.substr(member.key_begin, at - member.key_begin);
    member.key = Json::parse(key).get<std::string>();
    member.value_begin = skip_space(object, skip_space(object, at) + 1);
    member.value_end = value_end(object, member.value_begin);
    at = skip_space(object, member.value_end);
    if (at < object.size() && object[at] == ',') at = skip_space(object, at + 1);
    members.push_back(std::move(member));
  }
  return members;
}

std::vector<Member>::iterator find_member(std::vector<Member>& members, const std::string& key) {
  return std::find_if(members.begin(), members.end(),
                      [&](const Member& member) { return member.key == key; });
}

std::string indented(const Json& value, const std::string& indent) {
  std::string text;
  for (const char c : value.dump(2)) {
    text += c;
    if (c == '\n') text += indent;
  }
  return text;
}

std::string set_member(const std::string& object, std::span<const std::string> path,
                       const Json& value, std::size_t level) {
  std::vector<Member> members = members_of(object);
  const auto known = find_member(members, path[0]);
  const auto value_text = [&](const std::string& old) {
    if (path.size() > 1) {
      return set_member(old.starts_with('{') ? old : "{}", path.subspan(1), value, level + 1);
    }
    return indented(value, std::string(2 * level, ' '));
  };
  std::string text = object;
  if (known != members.end()) {
    const std::size_t size = known->value_end - known->value_begin;
    text.replace(known->value_begin, size, value_text(object.substr(known->value_begin, size)));
    return text;
  }
  std::string member = "\n";
  member += std::string(2 * level, ' ') + Json(path[0]).dump() + ": " + value_text("");
  if (members.empty()) {
    const std::size_t begin = object.find('{') + 1;
    return text.replace(begin, object.rfind('}') - begin,
                        member + "\n" + std::string(2 * level - 2, ' '));
  }
  return text.insert(members.back().value_end, "," + member);
}

void check_object(const std::string& text, const std::string& where) {
  const Json json = parse_python_json(text, where);
  if (!json.is_object()) {
    throw_format(where, std::string("it must hold a JSON object, but it is ") + json.type_name());
  }
}

}  // namespace

std::string set_json_member(const std::string& text, const std::vector<std::string>& path,
                            const Json& value, const std::string& where) {
  if (text.empty()) return set_member("{}", path, value, 1) + "\n";
  check_object(text, where);
  return set_member(text, path, value, 1);
}

std::string remove_json_member(const std::string& text, const std::string& key,
                               const std::string& where) {
  check_object(text, where);
  std::vector<Member> members = members_of(text);
  const auto member = find_member(members, key);
  if (member == members.end()) return text;
  std::size_t begin = member->key_begin;
  std::size_t end = member->value_end;
  if (members.size() == 1) {
    begin = text.find('{') + 1;
    end = text.rfind('}');
  } else if (member == members.begin()) {
    end = std::next(member)->key_begin;
  } else {
    begin = std::prev(member)->value_end;
  }
  return std::string(text).erase(begin, end - begin);
}

}  // namespace hqq
