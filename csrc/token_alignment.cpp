// Token alignment for MinED.
//
// Distances are Levenshtein's, computed 64 rows at a time (Myers' bit vectors) for patterns of up
// to 64 bytes, else row by row, and given up as soon as they must exceed a bound.
//
// The nearest token: an equal one is looked up. Otherwise candidates are visited by their length's
// gap to the query's, smallest first, and a candidate is measured only if neither the gap nor the
// bytes that occur in one of the two but not in the other, each of which costs an edit, already
// exceed the best distance so far. The result is that of the full search.
#include "token_alignment.h"

#include <algorithm>
#include <limits>

namespace cot2align {
namespace {

uint64_t characters_of(const std::string& token) {
  uint64_t characters = 0;
  for (const unsigned char byte : token) characters |= uint64_t{1} << (byte & 63);
  return characters;
}

// One side of many distances.
class Pattern {
 public:
  explicit Pattern(const std::string& token) : token_(token), size_(token.size()) {
    if (size_ <= 64)
      for (int i = 0; i < size_; ++i)
        rows_[static_cast<unsigned char>(token[i])] |= uint64_t{1} << i;
  }

  // The edit distance to `text`, or bound + 1 where it is larger than bound.
  int distance(const std::string& text, int bound) const {
    const int columns = text.size();
    if (size_ == 0 || columns == 0) return std::min(size_ + columns, bound + 1);
    return size_ <= 64 ? by_bits(text, columns, bound) : by_rows(text, columns, bound);
  }

 private:
  int by_bits(const std::string& text, int columns, int bound) const {
    const uint64_t last = uint64_t{1} << (size_ - 1);
    uint64_t up = ~uint64_t{0}, down = 0;  // where a column rises or falls from row to row
    int score = size_;
    for (int j = 0; j < columns; ++j) {
      const uint64_t equal = rows_[static_cast<unsigned char>(text[j])];
      const uint64_t vertical = equal | down;
      const uint64_t horizontal = (((equal & up) + up) ^ up) | equal;
      uint64_t right = down | ~(horizontal | up), left = up & horizontal;
      score += (right & last) != 0;
      score -= (left & last) != 0;
      if (score - (columns - 1 - j) > bound) return bound + 1;
      right = right << 1 | 1;
      left <<= 1;
      up = left | ~(vertical | right);
      down = right & vertical;
    }
    return score;
  }

  int by_rows(const std::string& text, int columns, int bound) const {
    std::vector<int> row(columns + 1);
    for (int j = 0; j <= columns; ++j) row[j] = j;
    for (int i = 1; i <= size_; ++i) {
      int diagonal = row[0], least = row[0] = i;
      for (int j = 1; j <= columns; ++j) {
        const int changed = diagonal + (token_[i - 1] != text[j - 1]);
        diagonal = row[j];
        row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
        least = std::min(least, row[j]);
      }
      if (least > bound) return bound + 1;
    }
    return std::min(row[columns], bound + 1);
  }

  const std::string& token_;
  int size_;
  uint64_t rows_[256] = {};  // for each byte the rows where the pattern has it
};

// Each distinct token once, and which of them each position has.
struct Distinct {
  explicit Distinct(const std::vector<std::string>& tokens) {
    std::unordered_map<std::string, int> numbers;
    for (const std::string& token : tokens) {
      const auto [found, is_new] = numbers.emplace(token, numbers.size());
      if (is_new) values.push_back(&token);
      at.push_back(found->second);
    }
  }
  std::vector<const std::string*> values;
  std::vector<int> at;
};

}  // namespace

TokenIndex::TokenIndex(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {
  for (size_t position = 0; position < tokens_.size(); ++position) {
    const std::string& token = tokens_[position];
    if (!positions_.emplace(token, position).second) continue;
    if (token.size() >= by_length_.size()) by_length_.resize(token.size() + 1);
    by_length_[token.size()].push_back({characters_of(token), static_cast<int64_t>(position)});
  }
}

std::vector<int64_t> TokenIndex::nearest(const std::vector<std::string>& queries,
                                         int num_threads) const {
  std::vector<int64_t> found(queries.size());
#pragma omp parallel for schedule(dynamic, 16) num_threads(num_threads)
  for (int64_t i = 0; i < static_cast<int64_t>(queries.size()); ++i)
    found[i] = nearest_one(queries[i]);
  return found;
}

int64_t TokenIndex::nearest_one(const std::string& query) const {
  if (const auto equal = positions_.find(query); equal != positions_.end()) return equal->second;
  const Pattern pattern(query);
  const uint64_t characters = characters_of(query);
  const int size = query.size(), longest = static_cast<int>(by_length_.size()) - 1;
  int best = std::numeric_limits<int>::max() - 1;
  int64_t position = -1;
  const auto visit = [&](int length, int gap) {
    for (const Entry& entry : by_length_[length]) {
      // A tie is of use only to a token that comes before the one found.
      const int bound = position < 0 || entry.position < position ? best : best - 1;
      if (gap > bound || __builtin_popcountll(characters & ~entry.characters) > bound ||
          __builtin_popcountll(entry.characters & ~characters) > bound)
        continue;
      const int distance = pattern.distance(tokens_[entry.position], bound);
      if (distance > bound) continue;
      best = distance;
      position = entry.position;
    }
  };
  for (int gap = 0; gap <= best && gap <= std::max(size, longest - size); ++gap) {
    if (size + gap <= longest) visit(size + gap, gap);
    if (gap > 0 && gap <= size && size - gap <= longest) visit(size - gap, gap);
  }
  return position;
}

std::vector<int64_t> align_tokens(const std::vector<std::string>& x,
                                  const std::vector<std::string>& y) {
  const int64_t rows = x.size(), columns = y.size();
  if (rows == 0 || columns == 0) return std::vector<int64_t>(rows, -1);
  const Distinct ours(x), theirs(y);
  std::vector<int64_t> costs(ours.values.size() * theirs.values.size());
  for (size_t i = 0; i < ours.values.size(); ++i) {
    const Pattern pattern(*ours.values[i]);
    for (size_t j = 0; j < theirs.values.size(); ++j)
      costs[i * theirs.values.size() + j] =
          pattern.distance(*theirs.values[j], std::numeric_limits<int>::max() - 1);
  }

  // Of the paths to (i, j), one place of margin on either side: the cheapest's cost.
  const int64_t stride = columns + 1, unreachable = std::numeric_limits<int64_t>::max() / 2;
  std::vector<int64_t> path((rows + 1) * stride, unreachable);
  path[0] = 0;
  for (int64_t i = 1; i <= rows; ++i) {
    const int64_t* cost = costs.data() + ours.at[i - 1] * theirs.values.size();
    int64_t *above = path.data() + (i - 1) * stride, *row = above + stride;
    for (int64_t j = 1; j <= columns; ++j)
      row[j] = cost[theirs.at[j - 1]] + std::min({above[j - 1], above[j], row[j - 1]});
  }

  std::vector<int64_t> partner(rows, -1), matches(rows, 0);
  for (int64_t i = rows, j = columns; i > 0 && j > 0;) {
    partner[i - 1] = j - 1;
    ++matches[i - 1];
    const int64_t* above = path.data() + (i - 1) * stride;
    const int64_t diagonal = above[j - 1], up = above[j], left = above[stride + j - 1];
    const bool along_both = diagonal <= up && diagonal <= left, along_x = up <= left;
    if (along_both || along_x) --i;
    if (along_both || !along_x) --j;
  }
  for (int64_t i = 0; i < rows; ++i)
    if (matches[i] > 1) partner[i] = -1;
  return partner;
}

}  // namespace cot2align
