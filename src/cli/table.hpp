// Text for people: tables and numbers.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

namespace hqq::cli {

// Control characters become '?': names come from files and go to a terminal.
std::string printable(const std::string& text);

// "5.24 MB" (decimal units, as disks are sold).
std::string bytes_text(std::uint64_t bytes);
// "2.62 M"
std::string count_text(double count);
// printf's %.<digits>f and %.<digits>g.
std::string fixed_text(double value, int digits);
std::string general_text(double value, int digits);
// "0:07", "12:30", "1:02:03"
std::string duration_text(double seconds);

// Columns as wide as their widest cell, the first one left-aligned, the others right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> titles);
  void add_row(std::vector<std::string> cells);
  void add_rule();
  bool empty() const { return rows_.empty(); }
  void print(std::ostream& out) const;

 private:
  std::vector<std::string> titles_;
  std::vector<std::vector<std::string>> rows_;  // an empty row is a rule
};

}  // namespace hqq::cli
