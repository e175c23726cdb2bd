// The declaration of an operator, parsed once, and a call of it: tensors, dims and options by name. No torch.
//
//   name(TENSORS; OPTIONS) -> OUTPUTS   ("; OPTIONS" may be missing; lists with commas)
//
//   tensor := NAME['?'] ':' DIM* ['|' MARK*]   '?': optional
//   DIM    := NAME | NAME' (a value of its own, shown without the prime) | INTEGER | a sum of products without spaces,
//             such as 2*wh-1+2*halo_h; NAME+INTEGER finds NAME where it is unknown. A first DIM of ... is any number of
//             dims, the same for every tensor that has it
//   MARK   := float (any of the three, its own) | integer (int32, int16, int8 or uint8, its own) | number (float or
//   int8)
//             | float32 | bfloat16 | float16 | int32 | int16 | int8 | uint8 | out_dtype (of an output: the DType that
//             the option of that name counts); else like the first one strided (any strides; else the last one is 1) |
//             packed (a contiguous copy is made where it is not) | whole (must be contiguous, as the forward returned
//             it)
//   option := NAME ':' TYPE [CONSTRAINT] ['=' DEFAULT]
//   TYPE   := float | float? | int | bool | int[2](NAME, NAME)    CONSTRAINT := > 0 | >= 0 | in LOW..HIGH
//
// The first tensor is the first required one that is not a grad_*: others are compared with it. Main tensors are it and
// the required ones that are neither grad_* nor whole. A call's dims are found in main tensors, then options are read,
// then the op's hook derives what else there is, then all other tensors are checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "view.h"

namespace effvit {

inline constexpr int kMaxTensors = 32, kMaxNames = 32, kMaxOptions = 16;

// A name in source code, hashed when that is compiled.
struct Name {
  uint32_t hash;
  constexpr Name(const char* s) : hash(2166136261u) {
    for (; *s; ++s) hash = (hash ^ static_cast<unsigned char>(*s)) * 16777619u;
  }
};

struct Dim {
  struct Term {
    int64_t factor;
    std::vector<int> names;
  };
  std::vector<Term> terms;

  // The name that is all of it, or -1.
  int name() const {
    return terms.size() == 1 && terms[0].factor == 1 && terms[0].names.size() == 1 ? terms[0].names[0] : -1;
  }
  // NAME+INTEGER: the name, or -1.
  int solvable() const {
    const bool sum = terms.size() == 2 && terms[0].factor == 1 && terms[0].names.size() == 1 && terms[1].names.empty();
    return sum ? terms[0].names[0] : -1;
  }
};

enum class Type { kLikeFirst, kFloat, kInteger, kNumber, kFixed, kOption };

struct TensorSpec {
  std::string name, shape;  // shape as messages show it
  bool leading = false;  // `...`: any number of dims before `dims`
  bool optional = false, strided = false, packed = false, whole = false, main = false;
  Type type = Type::kLikeFirst;
  DType dtype = DType::kFloat32;  // where the type is fixed
  std::vector<Dim> dims;
  int like =
      -1;  // of a main tensor: the earlier one that shares most dims; of an output: the input it is a gradient of
};

struct OptionSpec {
  enum class Kind { kFloat, kOptionalFloat, kInt, kBool, kPair };
  std::string name;
  Kind kind = Kind::kFloat;
  int names[2] = {-1, -1};  // of a pair's elements
  bool positive = false, not_negative = false, bounded = false;
  int64_t low = 0, high = 0;
};

class Declaration {
 public:
  explicit Declaration(const char* text);

  std::string text, op;  // text: with single spaces
  std::vector<TensorSpec> inputs, outputs;
  std::vector<OptionSpec> options;
  std::vector<std::string> names;  // of dims
  std::vector<uint32_t> name_hashes, tensor_hashes, option_hashes;  // tensors: inputs, then outputs
  int first = 0;

  // As torch spells it: `op(Tensor, int) -> (Tensor, Tensor)`.
  std::string signature() const;
  int name_slot(const std::string& name);

 private:
  [[noreturn]] void malformed(const std::string& part) const {
    throw std::logic_error("effvit: malformed declaration, at `" + part + "`: " + text);
  }
  Dim parse_dim(const std::string& s);
  TensorSpec parse_tensor(const std::string& s);
  OptionSpec parse_option(const std::string& s);
};

struct Option {
  bool given = true;
  double number = 0;  // of a bool: 0 or 1
  static constexpr size_t kMost = 8;  // integers that are kept
  int64_t integers[kMost] = {};
  int64_t count = 0;  // of the list that was given
};

// A call of an operator. What is looked up by name must be in the declaration, unless it says `find`.
struct Call {
  explicit Call(const Declaration& d) : declaration(d) {
    for (int64_t& dim : dims) dim = -1;
  }

  const Declaration& declaration;
  View views[kMaxTensors];  // inputs, then outputs
  int64_t dims[kMaxNames];  // -1: not known yet
  int64_t lead[6] = {};  // `...`
  int32_t lead_dims = -1;
  Option options[kMaxOptions];
  bool empty = false;  // nothing to compute
  bool readable = true;  // the host can read the tensors' values without waiting

  const char* op() const { return declaration.op.c_str(); }
  static int find(const std::vector<uint32_t>& hashes, Name name) {
    for (size_t i = 0; i < hashes.size(); ++i) {
      if (hashes[i] == name.hash) return static_cast<int>(i);
    }
    return -1;
  }
  static int at(const std::vector<uint32_t>& hashes, Name name) {
    const int i = find(hashes, name);
    if (i < 0) throw std::logic_error("effvit: a name that the declaration does not have");
    return i;
  }
  const View* find(Name name) const {
    const int i = find(declaration.tensor_hashes, name);
    return i < 0 || !views[i].given() ? nullptr : &views[i];
  }
  const View& operator[](Name name) const { return views[at(declaration.tensor_hashes, name)]; }
  bool given(Name name) const { return find(name) != nullptr; }
  int64_t dim(Name name) const { return dims[at(declaration.name_hashes, name)]; }
  int64_t& dim(Name name) { return dims[at(declaration.name_hashes, name)]; }
  const Option& option(Name name) const { return options[at(declaration.option_hashes, name)]; }
  bool has_option(Name name) const { return find(declaration.option_hashes, name) >= 0; }
  float number(Name name) const { return static_cast<float>(option(name).number); }
  int32_t integer(Name name) const { return static_cast<int32_t>(option(name).integers[0]); }
  bool flag(Name name) const { return option(name).number != 0; }

  // A tensor's data and leading strides, where the declaration has it and it was given.
  template <class T, class... Strides>
  void take(Name name, T*& data, Strides&... strides) const {
    const View* v = find(name);
    if (!v) return;
    data = static_cast<T*>(v->data);
    int i = 0;
    ((strides = v->stride[i++]), ...);
  }
  void take(Name name, int32_t& to) const { to = static_cast<int32_t>(dim(name)); }  // a dim that fits

  int64_t value(const Dim& d) const {  // -1 where a name in it is not known
    if (const int name = d.name(); name >= 0) return dims[name];
    int64_t sum = 0;
    for (const Dim::Term& term : d.terms) {
      int64_t product = term.factor;
      for (const int name : term.names) {
        if (dims[name] < 0) return -1;
        product *= dims[name];
      }
      sum += product;
    }
    return sum;
  }

  // Two optional tensors that make sense together only.
  void check_together(const char* a, const char* b) const {
    const bool has_a = given(a);
    check(has_a == given(b), op(), has_a ? b : a, " must be given together with ", has_a ? a : b, ", got None");
  }

  // Finds or compares the dims of an input.
  void check_shape(int i, const char* note) {
    const TensorSpec& spec = declaration.inputs[i];
    const View& v = views[i];
    const int n = static_cast<int>(spec.dims.size()), before = v.dim - n;
    bool ok = spec.leading ? before >= 0 && v.dim <= 6 : before == 0;
    if (ok && spec.leading && lead_dims < 0) {
      lead_dims = before;
      std::copy_n(v.size, before, lead);
    }
    ok = ok && (!spec.leading || (before == lead_dims && std::equal(lead, lead + before, v.size)));
    for (int k = 0; ok && k < n; ++k) {
      const int64_t expected = value(spec.dims[k]), size = v.size[before + k];
      int name = expected < 0 ? spec.dims[k].name() : -1;
      if (name >= 0) dims[name] = size;
      if (expected < 0 && spec.main && name < 0 && (name = spec.dims[k].solvable()) >= 0)
        dims[name] = size - spec.dims[k].terms[1].factor;  // what is below 0 is for the op's hook to refuse
      ok = name >= 0 || size == expected;
    }
    if (!ok) fail_shape(i, note);
  }

  // NAME+INTEGER of an input that was given.
  void solve(int i) {
    const TensorSpec& spec = declaration.inputs[i];
    for (size_t k = 0; k < spec.dims.size(); ++k) {
      const int name = spec.dims[k].solvable();
      if (name < 0 || dims[name] >= 0) continue;
      const int64_t rest = spec.dims[k].terms[1].factor;
      const View& v = views[i];
      check(v.dim == static_cast<int32_t>(spec.dims.size()) && v.size[k] >= rest, op(), spec.name, " must be [",
            declaration.names[name], " + ", rest, "], got ", Integers(v));
      dims[name] = v.size[k] - rest;
    }
  }

  void check_option(int i) {
    const OptionSpec& spec = declaration.options[i];
    Option& value = options[i];
    using Kind = OptionSpec::Kind;
    if (spec.kind == Kind::kFloat || (spec.kind == Kind::kOptionalFloat && value.given)) {
      const double x = value.number;
      const float narrow = static_cast<float>(x);
      check(std::isfinite(x), op(), spec.name, " must be finite, got ", x);
      check(std::isfinite(narrow), op(), spec.name, " must be finite in float32, got ", x);
      check(!spec.positive || narrow > 0.f, op(), spec.name, " must be positive, got ", x);
      check(!spec.not_negative || x >= 0, op(), spec.name, " must be at least 0, got ", x);
    } else if (spec.kind == Kind::kInt) {
      const int64_t x = value.integers[0];
      check(!spec.bounded || (x >= spec.low && x <= spec.high), op(), spec.name, " must be between ", spec.low, " and ",
            spec.high, ", got ", x);
      check(!spec.positive || x > 0, op(), spec.name, " must be positive, got ", x);
      check(!spec.not_negative || x >= 0, op(), spec.name, " must be at least 0, got ", x);
    } else if (spec.kind == Kind::kPair) {
      for (int k = 0; k < 2; ++k) {
        const int64_t x = value.integers[k];
        check(!spec.bounded || (x >= spec.low && x <= spec.high), op(), spec.name, " must be between ", spec.low,
              " and ", spec.high, ", got ", Integers(value.integers, 2));
        dims[spec.names[k]] = x;
      }
    }
  }

 private:
  [[noreturn]] void fail_shape(int i, const char* note) const {
    const TensorSpec& spec = declaration.inputs[i];
    const Integers got(views[i]);
    if (i == declaration.first) fail(op(), spec.name, " must be ", spec.shape, note, ", got ", got);
    if (spec.main) {
      fail(op(), spec.name, " must be ", spec.shape, " like ", declaration.inputs[spec.like].name, " ",
           Integers(views[spec.like]), ", got ", got);
    }
    std::vector<int64_t> expected(lead, lead + (spec.leading ? std::max(lead_dims, 0) : 0));
    for (const Dim& d : spec.dims) expected.push_back(value(d));
    fail(op(), spec.name, " must be ", spec.shape, " = ",
         Integers(expected.data(), static_cast<int64_t>(expected.size())), ", got ", got);
  }
};

// What an operator may leave out.
struct OpDefaults {
  static constexpr const char* kBackward = nullptr;
  static constexpr const char* kShapeNote = "";  // what messages add to the shape of the first tensor
  static void derive(Call&) {}  // dims that follow from others, relations between options and dims
  static void check(const Call&) {}  // what is left: tensors can be read
};

// ---- parsing --------------------------------------------------------------------------------------------------------

namespace declaration_detail {

inline std::string trim(const std::string& s) {
  const size_t begin = s.find_first_not_of(' ');
  return begin == std::string::npos ? "" : s.substr(begin, s.find_last_not_of(' ') - begin + 1);
}

// Pieces between separators that are not in parentheses, trimmed. None of an empty text.
inline std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> pieces;
  std::string piece;
  int depth = 0;
  for (const char c : s + separator) {
    depth += (c == '(') - (c == ')');
    if (c == separator && depth == 0) {
      if (separator != ' ' || !piece.empty()) pieces.push_back(trim(piece));
      piece.clear();
    } else {
      piece += c;
    }
  }
  if (pieces.size() == 1 && pieces[0].empty()) pieces.clear();
  return pieces;
}

inline bool starts_with(const std::string& s, const char* with) { return s.rfind(with, 0) == 0; }

}  // namespace declaration_detail

inline int Declaration::name_slot(const std::string& name) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  if (names.size() == kMaxNames) malformed(name);
  names.push_back(name);
  name_hashes.push_back(Name(name.c_str()).hash);
  return static_cast<int>(names.size()) - 1;
}

inline Dim Declaration::parse_dim(const std::string& s) {
  Dim dim;
  for (size_t i = 0; i < s.size();) {
    Dim::Term term{s[i] == '-' ? -1 : 1, {}};
    i += s[i] == '-' || s[i] == '+';
    for (bool more = true; more;) {
      const size_t end = std::min(s.find_first_of("+-*", i), s.size());
      const std::string factor = s.substr(i, end - i);
      if (factor.empty()) malformed(s);
      if (factor.find_first_not_of("0123456789") == std::string::npos)
        term.factor *= std::stoll(factor);
      else
        term.names.push_back(name_slot(factor));
      more = end < s.size() && s[end] == '*';
      i = end + more;
    }
    dim.terms.push_back(term);
  }
  return dim;
}

inline TensorSpec Declaration::parse_tensor(const std::string& s) {
  using namespace declaration_detail;
  const size_t colon = s.find(':');
  if (colon == std::string::npos) malformed(s);
  TensorSpec spec;
  spec.name = trim(s.substr(0, colon));
  if (spec.name.empty()) malformed(s);
  if (spec.name.back() == '?') spec.optional = true, spec.name.pop_back();
  const std::vector<std::string> parts = split(s.substr(colon + 1), '|');
  if (parts.empty() || parts.size() > 2) malformed(s);
  for (const std::string& dim : split(parts[0], ' ')) {
    if (dim == "..." && spec.shape.empty())
      spec.leading = true;
    else
      spec.dims.push_back(parse_dim(dim));
    spec.shape += (spec.shape.empty() ? "[" : ", ") + dim.substr(0, dim.find('\''));
  }
  spec.shape += spec.shape.empty() ? "[]" : "]";
  if (spec.dims.size() > 6) malformed(s);
  static const struct {
    const char* name;
    DType dtype;
  } fixed[] = {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16},
               {"int32", DType::kInt32},     {"int8", DType::kInt8},         {"uint8", DType::kUInt8},
               {"int16", DType::kInt16}};
  for (const std::string& mark : parts.size() > 1 ? split(parts[1], ' ') : std::vector<std::string>()) {
    bool known = mark == "strided" || mark == "packed" || mark == "whole";
    if (mark == "float") spec.type = Type::kFloat, known = true;
    if (mark == "integer") spec.type = Type::kInteger, known = true;
    if (mark == "number") spec.type = Type::kNumber, known = true;
    if (mark == "out_dtype") spec.type = Type::kOption, known = true;
    spec.strided |= mark == "strided", spec.packed |= mark == "packed", spec.whole |= mark == "whole";
    for (const auto& f : fixed) {
      if (mark == f.name) spec.type = Type::kFixed, spec.dtype = f.dtype, known = true;
    }
    if (!known) malformed(mark);
  }
  return spec;
}

inline OptionSpec Declaration::parse_option(const std::string& s) {
  using namespace declaration_detail;
  using Kind = OptionSpec::Kind;
  const size_t colon = s.find(':');
  if (colon == std::string::npos) malformed(s);
  OptionSpec spec;
  spec.name = trim(s.substr(0, colon));
  std::vector<std::string> words = split(s.substr(colon + 1), ' ');  // int[2](a, b) is one word
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "=") words.resize(i);  // the dispatcher fills in defaults
  }
  if (words.empty()) malformed(s);
  if (starts_with(words[0], "int[2](")) {
    spec.kind = Kind::kPair;
    const std::vector<std::string> pair = split(words[0].substr(7, words[0].size() - 8), ',');
    if (pair.size() != 2) malformed(s);
    for (int k = 0; k < 2; ++k) spec.names[k] = name_slot(pair[k]);
  } else if (words[0] == "float?") {
    spec.kind = Kind::kOptionalFloat;
  } else if (words[0] == "int") {
    spec.kind = Kind::kInt;
  } else if (words[0] == "bool") {
    spec.kind = Kind::kBool;
  } else if (words[0] != "float") {
    malformed(s);
  }
  if (words.size() == 1) return spec;
  if (words.size() != 3) malformed(s);
  const size_t dots = words[2].find("..");
  spec.positive = words[1] == ">" && words[2] == "0";
  spec.not_negative = words[1] == ">=" && words[2] == "0";
  spec.bounded = words[1] == "in" && dots != std::string::npos;
  if (spec.bounded) spec.low = std::stoll(words[2].substr(0, dots)), spec.high = std::stoll(words[2].substr(dots + 2));
  if (!spec.positive && !spec.not_negative && !spec.bounded) malformed(s);
  return spec;
}

inline Declaration::Declaration(const char* source) {
  using namespace declaration_detail;
  for (const char* c = source; *c; ++c) {
    const bool space = *c == ' ' || *c == '\n' || *c == '\t';
    if (!space || (!text.empty() && text.back() != ' ')) text += space ? ' ' : *c;
  }
  text = trim(text);
  const size_t open = text.find('('), arrow = text.find("->"), close = text.rfind(')', arrow);
  if (open == std::string::npos || arrow == std::string::npos || close == std::string::npos) malformed(text);
  op = trim(text.substr(0, open));
  const std::vector<std::string> halves = split(text.substr(open + 1, close - open - 1), ';');
  if (halves.empty() || halves.size() > 2) malformed(text);
  for (const std::string& s : split(halves[0], ',')) inputs.push_back(parse_tensor(s));
  for (const std::string& s : halves.size() > 1 ? split(halves[1], ',') : std::vector<std::string>())
    options.push_back(parse_option(s));
  for (const std::string& s : split(text.substr(arrow + 2), ',')) outputs.push_back(parse_tensor(s));
  if (inputs.size() + outputs.size() > kMaxTensors || options.size() > kMaxOptions) malformed(text);

  first = -1;
  for (size_t i = 0; i < inputs.size(); ++i) {
    TensorSpec& spec = inputs[i];
    const bool candidate = !spec.optional && !starts_with(spec.name, "grad_");
    if (candidate && first < 0) first = static_cast<int>(i);
    spec.main = candidate && (first == static_cast<int>(i) || !spec.whole);
    int most = -1;
    for (size_t j = 0; spec.main && j < i; ++j) {
      if (!inputs[j].main) continue;
      int shared = 0;
      for (const Dim& a : spec.dims) {
        for (const Dim& b : inputs[j].dims) shared += a.name() >= 0 && a.name() == b.name();
      }
      if (shared > most) most = shared, spec.like = static_cast<int>(j);
    }
    tensor_hashes.push_back(Name(spec.name.c_str()).hash);
  }
  if (first < 0) malformed(text);
  for (TensorSpec& spec : outputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (spec.name == "d" + inputs[i].name) spec.like = static_cast<int>(i);
    }
    if (spec.optional && spec.like < 0) malformed(spec.name);
    tensor_hashes.push_back(Name(spec.name.c_str()).hash);
  }
  for (const OptionSpec& spec : options) option_hashes.push_back(Name(spec.name.c_str()).hash);
  for (const auto* hashes : {&tensor_hashes, &option_hashes, &name_hashes}) {
    for (size_t i = 0; i < hashes->size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        if ((*hashes)[i] == (*hashes)[j]) malformed("a name that is there twice");
      }
    }
  }
}

inline std::string Declaration::signature() const {
  std::string in, out;
  for (const TensorSpec& spec : inputs)
    in += (in.empty() ? "" : ", ") + std::string(spec.optional ? "Tensor?" : "Tensor");
  static const char* const types[] = {"float", "float?", "int", "bool", "int[]"};
  for (const OptionSpec& spec : options) in += std::string(", ") + types[static_cast<int>(spec.kind)];
  for (size_t i = 0; i < outputs.size(); ++i) out += i ? ", Tensor" : "Tensor";
  return op + "(" + in + ") -> " + (outputs.size() == 1 ? out : "(" + out + ")");
}

}  // namespace effvit
