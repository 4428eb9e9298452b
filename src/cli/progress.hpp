// Progress of long operations: a bar on a terminal, now and then a line elsewhere.
#pragma once

#include <ostream>
#include <string>

#include "hqq/checkpoint.hpp"

namespace hqq::cli {

class ProgressPrinter {
 public:
  ProgressPrinter(std::ostream& err, bool quiet);
  // Clears the bar.
  ~ProgressPrinter();
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;

  // For the library. Returns false after Ctrl-C. Must not outlive the printer.
  ProgressCallback callback();

 private:
  void show(const Progress& progress);
  void clear_bar();

  std::ostream& err_;
  bool quiet_;
  bool terminal_;
  bool bar_drawn_ = false;
  std::string stage_;
  // Where the stage began: a resumed run starts with work done in no time.
  double start_done_ = 0;
  double start_seconds_ = 0;
  double last_line_ = 0;  // seconds
};

}  // namespace hqq::cli
