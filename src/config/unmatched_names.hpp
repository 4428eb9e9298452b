// What may have been meant by a name that fits nothing.
#pragma once

#include <string>
#include <vector>

namespace hqq {

// What a rule may name in a model with these layers: they, their parents and parts of their tags.
// General names come first.
std::vector<std::string> names_for_rules(const std::vector<std::string>& layers);

// The candidate that is nearest to a name; of equally near ones that with the longest start in
// common, then the first. Empty when there is nothing to compare with. Of a pattern its longest
// part without wildcards is compared.
std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace hqq
