// The binding of every operator: takes a call off torch's stack, checks it against the declaration, allocates the
// outputs, and hands it to a backend (cpu/binding.h, cuda/binding.h).
//
// An operator is a struct of csrc/common/<op>.h, derived from OpDefaults: the declarations kForward and kBackward
// (null: none), kEmpty (dims of which one that is 0 leaves nothing to compute), hooks, and params(call). A successful
// check allocates nothing; messages are put together on failure.
#pragma once

#include "declaration.h"
#include "stable.h"

namespace effvit {

// One direction of an operator.
struct Operation {
  Operation(const char* declaration, const char* empty_dims, const char* note, void (*derive)(Call&),
            void (*check)(const Call&))
      : declaration(declaration), note(note), derive(derive), check(check) {
    for (const std::string& dim : declaration_detail::split(empty_dims, ' ')) {
      if (dim == "...")
        leading_ = true;
      else
        empty_dims_.push_back(this->declaration.name_slot(dim));
    }
  }

  Declaration declaration;
  const char* note;
  void (*derive)(Call&);
  void (*check)(const Call&);

  bool empty(const Call& call) const {
    for (const int name : empty_dims_) {
      if (call.dims[name] == 0) return true;
    }
    return leading_ && std::find(call.lead, call.lead + call.lead_dims, 0) != call.lead + call.lead_dims;
  }

 private:
  std::vector<int> empty_dims_;
  bool leading_ = false;
};

template <class Op, bool backward>
const Operation& operation() {
  static const Operation o(backward ? Op::kBackward : Op::kForward, Op::kEmpty, Op::kShapeNote, &Op::derive,
                           &Op::check);
  return o;
}

// What a call owns.
class Binding {
 public:
  // Takes the arguments off the stack: whatever happens then, they are released.
  Binding(const Operation& operation, StableIValue* stack, uint64_t arguments, uint64_t outputs)
      : call(operation.declaration), operation_(operation), d_(operation.declaration) {
    using torch::stable::detail::to;
    const size_t n = d_.inputs.size();
    effvit::check(arguments == n + d_.options.size() && outputs == d_.outputs.size(), call.op(),
                  "the schema must have as many arguments and outputs as the declaration, got ", arguments, " and ",
                  outputs);
    for (size_t i = 0; i < n; ++i) {
      if (!d_.inputs[i].optional)
        tensors_[i] = Handle(to<AtenTensorHandle>(stack[i]));
      else if (const auto handle = to<std::optional<AtenTensorHandle>>(stack[i]))
        tensors_[i] = Handle(*handle);
    }
    for (size_t i = 0; i < d_.options.size(); ++i) read_option(d_.options[i], call.options[i], stack[n + i]);
  }

  void check() {
    const int n = static_cast<int>(d_.inputs.size());
    for (int i = 0; i < n; ++i) {
      if (tensors_[i]) read_sizes(i);
    }
    const auto check_tensor = [&](int i) {
      call.check_shape(i, operation_.note);
      check_kind(i);
    };
    for (int i = 0; i < n; ++i) {
      if (d_.inputs[i].main) check_tensor(i);
    }
    for (int i = 0; i < static_cast<int>(d_.options.size()); ++i) {
      effvit::check(d_.options[i].kind != OptionSpec::Kind::kPair || call.options[i].count == 2, call.op(),
                    d_.options[i].name, " must be 2 integers, got ",
                    Integers(call.options[i].integers, std::min<int64_t>(call.options[i].count, Option::kMost)));
      call.check_option(i);
    }
    operation_.derive(call);
    for (int i = 0; i < n; ++i) {
      if (tensors_[i]) call.solve(i);
    }
    for (const bool optional : {false, true}) {  // required ones first: optional ones follow from them
      for (int i = 0; i < n; ++i) {
        if (tensors_[i] && !d_.inputs[i].main && d_.inputs[i].optional == optional) check_tensor(i);
      }
    }
    operation_.check(call);
    call.empty = operation_.empty(call);
  }

  void allocate_outputs() {
    const int n = static_cast<int>(d_.inputs.size());
    for (int i = 0; i < static_cast<int>(d_.outputs.size()); ++i) {
      const TensorSpec& spec = d_.outputs[i];
      View& view = call.views[n + i];
      const bool absent = spec.optional && !tensors_[spec.like];
      view.dtype = spec.type == Type::kFixed    ? spec.dtype
                   : spec.type == Type::kOption ? static_cast<DType>(call.integer("out_dtype"))
                   : spec.type == Type::kFloat  ? (absent ? DType::kFloat32 : call.views[spec.like].dtype)
                                                : call.views[d_.first].dtype;
      const int before = spec.leading && !absent ? call.lead_dims : 0;
      view.dim = absent ? 1 : before + static_cast<int32_t>(spec.dims.size());
      std::copy_n(call.lead, before, view.size);
      for (int k = before; k < view.dim; ++k) view.size[k] = absent ? 0 : call.value(spec.dims[k - before]);
      tensors_[n + i] = allocate(view, device_);
      if (call.empty && view.count() > 0) {
        torch::stable::Tensor t = tensors_[n + i].tensor();
        torch::stable::zero_(t);
      }
      if (absent) view = View();
    }
  }

  // Lives as long as the call.
  float* workspace(int64_t floats) {
    if (floats <= 0) return nullptr;
    View view;
    view.dim = 1, view.size[0] = floats;
    workspace_ = allocate(view, device_);
    return static_cast<float*>(view.data);
  }

  void give_outputs(StableIValue* stack) {
    for (size_t i = 0; i < d_.outputs.size(); ++i)
      stack[i] = torch::stable::detail::from(tensors_[d_.inputs.size() + i].release());
  }

  const Device& device() const { return device_; }

  Call call;

 private:
  static void read_option(const OptionSpec& spec, Option& option, StableIValue value) {
    using torch::stable::detail::to;
    switch (spec.kind) {
      case OptionSpec::Kind::kFloat:
        option.number = to<double>(value);
        break;
      case OptionSpec::Kind::kOptionalFloat: {
        const auto number = to<std::optional<double>>(value);
        option.given = number.has_value();
        option.number = number.value_or(0.);
        break;
      }
      case OptionSpec::Kind::kInt:
        option.integers[0] = to<int64_t>(value);
        break;
      case OptionSpec::Kind::kBool:
        option.number = to<bool>(value);
        break;
      case OptionSpec::Kind::kPair: {
        const auto list = to<std::vector<int64_t>>(value);
        option.count = static_cast<int64_t>(list.size());
        for (size_t k = 0; k < Option::kMost && k < list.size(); ++k) option.integers[k] = list[k];
        break;
      }
    }
  }

  void read_sizes(int i) {
    int64_t dim = 0, *sizes = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensors_[i].get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensors_[i].get(), &sizes));
    View& view = call.views[i];
    view.dim = static_cast<int32_t>(dim);
    for (int k = 0; k < dim && k < 6; ++k) view.size[k] = sizes[k];
  }

  // Of a tensor whose shape is right: dtype, device, layout. Without a tensor torch passes one of shape [0] that has
  // none of these.
  void check_kind(int i) {
    const TensorSpec& spec = d_.inputs[i];
    const Handle& t = tensors_[i];
    View& view = call.views[i];
    view.dtype = dtype_of(t);
    if (spec.type == Type::kFloat || (i == d_.first && spec.type == Type::kLikeFirst)) {
      if (view.dtype > DType::kFloat16) fail_dtype(i, "float32, bfloat16 or float16", "");
    } else if (spec.type == Type::kInteger) {
      if (view.dtype < DType::kInt32 || view.dtype > DType::kInt16) fail_dtype(i, "int32, int16, int8 or uint8", "");
    } else if (spec.type == Type::kNumber) {
      if (view.dtype > DType::kFloat16 && view.dtype != DType::kInt8)
        fail_dtype(i, "float32, bfloat16, float16 or int8", "");
    } else if (spec.type == Type::kFixed) {
      if (view.dtype != spec.dtype) fail_dtype(i, dtype_name(spec.dtype), "");
    } else if (view.dtype != call.views[d_.first].dtype) {
      fail_dtype(i, dtype_name(call.views[d_.first].dtype), " like ");
    }
    const Device device = device_of(t);
    if (i == d_.first) device_ = device;
    effvit::check(device == device_, call.op(), spec.name, " must be on the device of ", d_.inputs[d_.first].name,
                  ", got another device");
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    for (int k = 0; k < view.dim; ++k) view.stride[k] = strides[k];
    if (spec.packed) {
      if (!view.contiguous()) {
        AtenTensorHandle copy = nullptr;
        const torch::stable::Tensor contiguous = torch::stable::contiguous(t.tensor());
        TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(contiguous.get(), &copy));
        tensors_[i] = Handle(copy);
        int64_t stride = 1;
        for (int k = view.dim - 1; k >= 0; --k) view.stride[k] = stride, stride *= view.size[k];
      }
    } else if (spec.whole) {
      effvit::check(view.contiguous(), call.op(), spec.name,
                    " must be contiguous as the forward returned it, got another layout");
    } else if (!spec.strided && view.dim > 0) {
      const int last = view.dim - 1;
      effvit::check(view.stride[last] == 1 || view.size[last] <= 1 || view.count() == 0, call.op(), spec.name,
                    " must have a last stride of 1, got ", view.stride[last]);
    }
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensors_[i].get(), &data));
    view.data = const_cast<void*>(data);
  }

  [[noreturn]] void fail_dtype(int i, const char* expected, const char* like) const {
    bool defined = true;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(tensors_[i].get(), &defined));
    effvit::check(defined, call.op(), d_.inputs[i].name, " must be a torch.Tensor, got None");
    int32_t number = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensors_[i].get(), &number));
    const char* given = "None";  // as an undefined tensor, whose dtype torch does not convert
    try {
      given = dtype_name(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number)));
    } catch (const std::exception&) {
    }
    fail(call.op(), d_.inputs[i].name, " must be ", expected, like, *like ? d_.inputs[d_.first].name : "", ", got ",
         given);
  }

  const Operation& operation_;
  const Declaration& d_;
  Device device_;
  Handle tensors_[kMaxTensors], workspace_;  // tensors: inputs, then outputs
};

// The kernel that torch calls. Backend::run<Op>(binding, backward) computes.
template <class Op, bool backward, class Backend>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  Binding binding(operation<Op, backward>(), stack, arguments, outputs);
  binding.call.readable = Backend::kReadable;
  binding.check();
  const DeviceGuard guard(binding.device());
  binding.allocate_outputs();
  if (!binding.call.empty) Backend::template run<Op>(binding, backward);
  binding.give_outputs(stack);
}

template <class Op, class Backend>
void register_op(torch::stable::detail::StableLibrary& library) {
  const auto add = [&](const Declaration& d, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    library.impl(d.op.c_str(), kernel);
    abi::signatures() += d.signature() + "\n";
    abi::declarations() += d.text + "\n";
  };
  add(operation<Op, false>().declaration, &boxed<Op, false, Backend>);
  if constexpr (Op::kBackward != nullptr) add(operation<Op, true>().declaration, &boxed<Op, true, Backend>);
}

}  // namespace effvit

// Registers an operator, both directions where it has two, for this library's device, if this machine can run them.
#define EFFVIT_REGISTER(op, Backend, runs_here)                         \
  STABLE_TORCH_LIBRARY_IMPL(EFFVIT_NAMESPACE, EFFVIT_DISPATCH_KEY, m) { \
    if (runs_here) effvit::register_op<effvit::ops::op, Backend>(m);    \
  }
