// One thread's share of a search: a range of queries against a range of blocks.
//
// A cell walks its blocks in chunks that stay in the cache while all its tiles of queries pass over
// them. Each of its queries keeps a CandidateList. A sample of the blocks comes first: the dots
// found there give a threshold for all others.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/topk_candidates.h"

namespace deeprec::topk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A sample of n rows gives the first threshold. It costs in proportion to n, and the candidates
// that pass to k N / n, so the best n is some factor times sqrt(k N).
constexpr double kSampleFactor = 3, kProvingFactor = 6;
// The share of queries that may have to be searched for again, because a guess was too high.
constexpr double kMisses = 0.002;
// Blocks whose dots for a tile of queries are kept: 4 MB.
constexpr int64_t kMostSampled = 512;
// When an eighth of what a tile scans are candidates, exact scores at once are cheaper; after
// eight chunks the codes get another chance.
constexpr int64_t kDenseShare = 8, kDenseChunks = 8;
constexpr int64_t kHits = 8192;
static_assert(kHits >= kMaxTile * kBlockRows, "room for the hits of a block");

struct Grid {
  int64_t query_parts, item_parts;
};

// What a sample may be used for. A guess of the k-th best score lets fewer rows pass than what is
// proven, but may be too high: then the answer is not, and the query is searched for again.
enum class Start { guess, prove };

struct Plan {
  const Index& index;
  const Request& request;
  const Kernels& kernels;
  bool use_codes;
  int64_t k;       // what is asked for, or all there is
  int64_t blocks;  // of kBlockRows rows
  int64_t chunk;   // blocks
  Grid grid;
  Start start;
};

inline char* on_cache_line(char* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// A rank in a sample: the score there is hardly ever more than the k-th best of all rows, if
// `expected` of the k best are in the sample, whose number is about Poisson.
inline int64_t guess_rank(double expected, int64_t k) {
  double term = std::exp(-expected), fewer = 0;  // P(number = rank), P(number < rank)
  int64_t rank = 0;
  while (rank < k && 1 - fewer > kMisses) {
    fewer += term;
    term *= expected / double(++rank);
  }
  return std::max<int64_t>(rank, 1);
}

// One thread's share: a range of queries against a range of blocks.
class Cell {
 public:
  Cell(const Plan& plan, const Queries& queries, CandidateList* lists, int64_t query_begin,
       int64_t query_end, int64_t block_begin, int64_t block_end)
      : plan_(plan), queries_(queries), lists_(lists), block_begin_(block_begin),
        block_end_(block_end), shape_(code_shape(plan.index.rows.dim)),
        table_{plan.index.filter.codes, plan.index.filter.bounds, plan.index.filter.cluster,
               shape_.quads, shape_.steps},
        rescorer_(plan.kernels, plan.index, CandidateList::capacity(plan.k)),
        hits_(new Hit[size_t(kHits)]), buffer_{hits_.get(), kHits, 0} {
    const int64_t width = plan.kernels.tile(shape_.quads);
    for (int64_t q = query_begin; q < query_end; q += width)
      tiles_.push_back({q, int(std::min(width, query_end - q)), 0, nullptr});
  }

  void run() {
    if (plan_.use_codes) prepare_tiles();
    for (int64_t g = block_begin_; g < block_end_; g += plan_.chunk) {
      const int64_t end = std::min(block_end_, g + plan_.chunk);
      for (Span& span : tiles_) {
        if (!span.coded) {
          direct(span, g, end);
        } else if (span.dense > 0) {
          --span.dense;
          direct(span, g, end);
        } else {
          scan(span, g, end);
        }
      }
    }
  }

 private:
  struct Span {
    int64_t first;  // query
    int count;
    int64_t dense;  // chunks still to be scored directly
    Tile* coded;    // nullptr: no prefilter
  };
  struct Ranked {
    float score;
    int32_t position;
  };

  void prepare_tiles() {
    const int64_t code_bytes = shape_.quads * 4;
    const int64_t scratch = (plan_.kernels.scratch_bytes(shape_.quads) + 63) / 64 * 64;
    const int64_t width = (tiles_[0].count + kSubtile - 1) / kSubtile * kSubtile;
    const int64_t centers = std::max<int64_t>(1, plan_.index.filter.centers);
    const int64_t shifts = centers * width * int64_t(sizeof(double));
    const int64_t size = kMaxTile * code_bytes + scratch + shifts;
    // Rows of a matrix-unit tile are fetched fastest from whole cache lines.
    storage_.resize(size_t(size) * tiles_.size() + 64);
    char* at = on_cache_line(storage_.data());
    coded_.resize(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t, at += size) {
      Tile& tile = coded_[t];
      tiles_[t].coded = &tile;
      tile.count = tiles_[t].count;
      tile.codes = reinterpret_cast<int8_t*>(at);
      tile.scratch = at + kMaxTile * code_bytes;
      tile.packed = false;
      tile.shift = reinterpret_cast<double*>(at + kMaxTile * code_bytes + scratch);
      tile.shift_stride = width;
      tile.sampled = {};
      const double* exact[kMaxTile];
      for (int j = 0; j < tile.count; ++j) {
        const CodedQuery& query = queries_[tiles_[t].first + j];
        exact[j] = query.exact;
        std::copy(query.codes, query.codes + code_bytes, tile.codes + j * code_bytes);
        tile.inverse_scale[j] = 1 / query.scale;
        tile.norm[j] = query.norm;
        tile.error[j] = query.error;
        tile.offset[j] = query.offset;
        tile.threshold[j] = -kInfinity;
      }
      for (int j = tile.count; j % kSubtile; ++j) {
        tile.norm[j] = tile.error[j] = tile.offset[j] = 0;
        tile.inverse_scale[j] = 1;
        tile.threshold[j] = kInfinity;  // never reached
      }
      if (plan_.index.filter.center)
        plan_.kernels.products(plan_.index.filter.center, centers, plan_.index.rows.dim, exact,
                               tile.count, tile.shift, width);
      start(tiles_[t]);
    }
  }

  // Scans a sample of the tile's blocks: the first threshold, and the candidates among its rows.
  void start(const Span& span) {
    Tile& tile = *span.coded;
    const bool guess = plan_.start == Start::guess;
    const int64_t k = plan_.k, blocks = block_end_ - block_begin_;
    const double rows = (guess ? kSampleFactor : kProvingFactor) *
                        std::sqrt(double(k) * double(blocks * kBlockRows));
    const int64_t count = std::min({blocks / 2, int64_t(rows) / kBlockRows, kMostSampled});
    // Of the k best of all rows, that many are expected in the sample.
    const double expected = double(k) * double(count) / double(plan_.blocks);
    const int64_t rank = guess ? guess_rank(expected, k) : k;
    const int64_t lanes = (2 * rank + kBlockRows - 1) / kBlockRows * kBlockRows;
    if (count < 2 * lanes / kBlockRows) return;
    // From the middle of a stride: the first rows are the longest, and would stand for too many.
    const int64_t stride = blocks / count;
    tile.sampled = {block_begin_ + stride / 2, stride, count};
    const int64_t pitch = pitch_of(tile.count);
    const int64_t dot_bytes = count * pitch_of(tiles_[0].count) * kBlockRows * sizeof(int32_t);
    if (!dots_) dots_.reset(new char[size_t(dot_bytes + 64)]);
    int32_t* dots = reinterpret_cast<int32_t*>(on_cache_line(dots_.get()));
    scores_.assign(size_t(tile.count * lanes), -kInfinity);
    positions_.resize(scores_.size());
    const Sample sample{dots, pitch, lanes, scores_.data(), positions_.data()};
    plan_.kernels.sample(table_, tile, sample);
    for (int j = 0; j < tile.count; ++j) {
      if (guess) {
        guess_threshold(span, j, sample, rank);
      } else {
        prove_threshold(span, j, sample);
      }
      publish(span, j);
    }
    for (int64_t i = 0; i < count;) {
      buffer_.count = 0;
      i = plan_.kernels.collect(table_, tile, sample, i, count, buffer_);
      add_hits(span);
    }
  }

  // The approximate score of that rank in the sample, or what is likely reached where codes cannot
  // tell the best rows from one another.
  void guess_threshold(const Span& span, int j, const Sample& sample, int64_t rank) {
    const float* score = sample.score + j * sample.lanes;
    const int32_t* position = sample.position + j * sample.lanes;
    ranked_.clear();
    for (int64_t l = 0; l < sample.lanes; ++l)
      if (score[l] > -kInfinity && allowed(span, j, uint32_t(position[l])))
        ranked_.push_back({score[l], position[l]});
    if (int64_t(ranked_.size()) < rank) return;
    const auto higher = [](const Ranked& a, const Ranked& b) { return a.score > b.score; };
    std::nth_element(ranked_.begin(), ranked_.begin() + (rank - 1), ranked_.end(), higher);
    const Ranked& best = *std::min_element(ranked_.begin(), ranked_.begin() + rank, higher);
    const CodedQuery& q = queries_[span.first + j];
    const BlockBound& block = table_.bounds[best.position / kBlockRows];
    const double radius = (q.norm * block.error + q.error * block.norm) / block.inverse_scale;
    const double reached = std::min(double(ranked_[size_t(rank - 1)].score), best.score - radius);
    CandidateList& kept = list(span, j);
    kept.threshold = kept.guess = below(reached * q.scale);
    if (!std::isfinite(kept.guess)) kept.threshold = kept.guess = -kInfinity;
  }

  // k rows score at least that much: the likeliest, scored exactly, for which their least score is
  // nearer the truth than its bound.
  void prove_threshold(const Span& span, int j, const Sample& sample) {
    found_.clear();
    for (int64_t l = 0; l < sample.lanes; ++l) {
      const int64_t at = j * sample.lanes + l;
      if (!(sample.score[at] > -kInfinity)) continue;
      const int64_t p = sample.position[at];
      const Strided& sampled = span.coded->sampled;
      const int64_t i = (p / kBlockRows - sampled.first) / sampled.stride;
      const int32_t dot = sample.dots[(i * sample.pitch + j) * kBlockRows + p % kBlockRows];
      Candidate candidate;
      if (bounded(span, j, uint32_t(p), dot, candidate)) found_.push_back(candidate);
    }
    const int64_t k = plan_.k;
    if (int64_t(found_.size()) < k) return;
    std::nth_element(found_.begin(), found_.begin() + (k - 1), found_.end(), Likelier());
    CandidateList& kept = list(span, j);
    kept.rescored += rescorer_.resolve(found_.data(), k, queries_[span.first + j]);
    kept.threshold = rescorer_.kth_lower(found_.data(), k, k);
  }

  CandidateList& list(const Span& span, int j) { return lists_[span.first + j]; }

  // Neither padding nor excluded.
  bool allowed(const Span& span, int j, uint32_t position) const {
    return position < plan_.index.rows.count && !queries_.excluded(span.first + j, item(position));
  }

  // What is known of a row from its codes; false if it is not allowed.
  bool bounded(const Span& span, int j, uint32_t position, int32_t dot, Candidate& out) const {
    if (!allowed(span, j, position)) return false;
    out.id = item(position);
    out.position = position;
    const CodedQuery& q = queries_[span.first + j];
    const BlockBound& block = table_.bounds[position / kBlockRows];
    const double unit = q.scale / block.inverse_scale;
    const double shift = shifts_of(table_, *span.coded, position / kBlockRows)[j];
    const double middle = shift + (dot - q.offset) * unit;
    const double radius = (q.norm * block.error + q.error * block.norm) * unit * (1 + 0x1p-40);
    out.lower = below(middle - radius);
    out.upper = above(middle + radius);
    return true;
  }

  uint32_t item(uint32_t position) const {
    const uint32_t* order = plan_.index.filter.order;
    return order ? order[position] : position;
  }

  // The list's threshold as the scan wants it: below the fp32 rounding of any score that ties.
  void publish(const Span& span, int j) {
    if (!span.coded) return;
    const double t = std::min(list(span, j).threshold, FLT_MAX);
    span.coded->threshold[j] = t - (std::fabs(t) * 0x1p-23 + 0x1p-148);
  }

  void add(int64_t query, CandidateList& list, const Candidate& candidate) {
    if (candidate.upper < list.threshold) return;
    if (list.count == CandidateList::capacity(plan_.k))
      list.make_room(plan_.k, rescorer_, queries_[query]);
    list.items[list.count++] = candidate;
  }

  void scan(Span& span, int64_t begin, int64_t end) {
    Tile& tile = *span.coded;
    // Without a threshold everything is a candidate: start with a few blocks.
    int64_t step = std::isinf(tile.threshold[0]) ? 4 : end - begin, found = 0;
    for (int64_t g = begin; g < end;) {
      buffer_.count = 0;
      const int64_t stop = std::min(end, g + step);
      g = plan_.kernels.scan(table_, tile, g, stop, buffer_);
      if (g == stop) step *= 2;
      found += buffer_.count;
      add_hits(span);
    }
    // Rows of a cluster lie together: where they end, so do the candidates.
    if (!table_.cluster && begin != block_begin_ &&
        found * kDenseShare > (end - begin) * kBlockRows * span.count)
      span.dense = kDenseChunks;
  }

  // Those of the buffer, bounds and all, to their queries' lists.
  void add_hits(const Span& span) {
    for (int64_t i = 0; i < buffer_.count; ++i) {
      const Hit& hit = buffer_.hits[i];
      const int64_t query = span.first + hit.query;
      Candidate candidate;
      if (bounded(span, hit.query, hit.position, hit.dot, candidate))
        add(query, lists_[query], candidate);
    }
    for (int j = 0; buffer_.count && j < span.count; ++j) publish(span, j);
  }

  // Exact scores of all blocks but those of the sample.
  void direct(const Span& span, int64_t begin, int64_t end) {
    const Strided sampled = span.coded ? span.coded->sampled : Strided{};
    for (int64_t g = begin; g < end;) {
      const int64_t stop = std::min(end, sampled.next(g));
      direct_run(span, g, stop);
      g = stop + 1;
    }
  }

  void direct_run(const Span& span, int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlockRows, plan_.index.rows.count);
    const double* exact[kMaxTile];
    for (int j = 0; j < span.count; ++j) exact[j] = queries_[span.first + j].exact;
    int64_t step = list(span, 0).count < plan_.k ? 32 : kHits / span.count;
    for (int64_t p = begin * kBlockRows; p < last;) {
      float thresholds[kMaxTile];
      for (int j = 0; j < span.count; ++j) thresholds[j] = list(span, j).threshold;
      buffer_.count = 0;
      const int64_t stop = std::min(last, p + step);
      plan_.kernels.direct(plan_.index.rows, plan_.index.filter.order, exact, span.count,
                           thresholds, p, stop, buffer_);
      for (int j = 0; j < span.count; ++j) list(span, j).rescored += stop - p;
      for (int64_t i = 0; i < buffer_.count; ++i) {
        const Hit& hit = buffer_.hits[i];
        const int64_t query = span.first + hit.query;
        const uint32_t id = item(hit.position);
        if (!queries_.excluded(query, id))
          add(query, lists_[query], {hit.score, hit.score, id, Candidate::kRefined});
      }
      p = stop;
      step = std::min(2 * step, kHits / span.count);
    }
    for (int j = 0; j < span.count; ++j) publish(span, j);
  }

  const Plan& plan_;
  const Queries& queries_;
  CandidateList* lists_;  // by query
  const int64_t block_begin_, block_end_;
  const CodeShape shape_;
  const Table table_;
  Rescorer rescorer_;
  std::unique_ptr<Hit[]> hits_;  // not initialised: a small search would notice
  HitBuffer buffer_;
  std::unique_ptr<char[]> dots_;
  std::vector<float> scores_;
  std::vector<int32_t> positions_;
  std::vector<Span> tiles_;
  std::vector<Tile> coded_;
  std::vector<char> storage_;
  std::vector<Ranked> ranked_;
  std::vector<Candidate> found_;
};

}  // namespace deeprec::topk
