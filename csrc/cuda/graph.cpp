// A CUDA graph whose parts run where and as often as a kernel before them said: IF, WHILE and SWITCH nodes, captured in
// segments on one stream.
//
// A node's body can't be captured while its parent is: the parent's capture ends, the body is captured on the same
// stream, and the parent's goes on behind the node. With one stream the libraries' workspaces, which are kept by stream,
// stay the same, and so does the memory pool that allocations of all segments are taken from.

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "kernels.h"

#if CUDART_VERSION < 12040
#error "IF nodes want CUDA 12.4; build with EARLYEXIT_BUILD=cpu"
#endif

namespace earlyexit {
namespace {

constexpr const char* kOp = "ConditionalGraph";

class ConditionalGraph : public torch::CustomClassHolder {
 public:
  ~ConditionalGraph() override { abandon(); }

  // Capture what the current stream is given from now on; allocations come from a pool of torch.cuda.graph_pool_handle.
  void begin(int64_t device, int64_t pool, int64_t pool_number) {
    EE_CHECK(root_ == nullptr, kOp, "expected begin once, got a graph that has been begun; make a new one");
    device_ = static_cast<c10::DeviceIndex>(device);
    stream_ = c10::cuda::getCurrentCUDAStream(device_);
    EE_CHECK(stream_ != c10::cuda::getDefaultCUDAStream(device_), kOp,
             "expected a stream of its own, got the default one, which can't be captured");
    pool_ = {static_cast<c10::CaptureId_t>(pool), static_cast<c10::CaptureId_t>(pool_number)};
    const cudaStream_t mine = stream_.stream();
    c10::cuda::CUDACachingAllocator::beginAllocateToPool(device_, pool_, [mine](cudaStream_t s) { return s == mine; });
    holds_pool_ = allocates_ = true;
    C10_CUDA_CHECK(cudaGraphCreate(&root_, 0));
    capture(root_, nullptr);
  }

  // A number for a kernel to set, `first` where none has: what a node goes by.
  int64_t handle(int64_t first) {
    EE_CHECK(allocates_, kOp, "expected handle between begin and end");
    cudaGraphConditionalHandle made;
    C10_CUDA_CHECK(
        cudaGraphConditionalHandleCreate(&made, root_, static_cast<unsigned>(first), cudaGraphCondAssignDefault));
    EE_CHECK(made != 0, kOp, "expected a handle other than 0, which means none to the ops");
    return static_cast<int64_t>(made);
  }

  // What follows, up to end_if, runs where the handle isn't 0.
  void begin_if(int64_t handle) { open(handle, cudaGraphCondTypeIf, 1); }

  // What follows, up to end_while, runs as long as the handle isn't 0.
  void begin_while(int64_t handle) { open(handle, cudaGraphCondTypeWhile, 1); }

  // Of what follows, up to end_switch, in so many cases with next_case between them, the one runs whose number, from 0,
  // is the handle.
  void begin_switch(int64_t handle, int64_t cases) {
#if CUDART_VERSION >= 12080
    open(handle, cudaGraphCondTypeSwitch, cases);
#else
    EE_CHECK(false, kOp, "expected CUDA 12.8 for begin_switch, got a build against ", CUDART_VERSION);
#endif
  }

  bool has_switch() const { return CUDART_VERSION >= 12080; }

  void next_case() {
    EE_CHECK(!open_.empty() && open_.back().entered < open_.back().bodies.size(), kOp,
             "expected next_case between the cases of begin_switch, got more of them");
    pause();
    enter_body();
  }

  void close() {
    EE_CHECK(!open_.empty() && open_.back().entered == open_.back().bodies.size(), kOp,
             "expected the end of a node after its beginning and all of its cases");
    pause();
    const Node node = open_.back();
    open_.pop_back();
    capture(node.parent, &node.node);
  }

  // Set `chosen` to the turn [1] int32 that it is, count that up, and `again` to whether it was less than the last.
  void take_turn(const at::Tensor& turn, int64_t chosen, int64_t again, int64_t turns) {
    EE_CHECK(allocates_, kOp, "expected take_turn between begin and end");
    check_tensor(kOp, "turn", turn, at::kInt, {1});
    launch_take_turn(turn.mutable_data_ptr<int32_t>(), static_cast<unsigned long long>(chosen),
                     static_cast<unsigned long long>(again), static_cast<int32_t>(turns), stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void end() {
    EE_CHECK(allocates_ && open_.empty(), kOp, "expected end after begin and the end of all nodes");
    pause();
    stop_allocating();
    C10_CUDA_CHECK(cudaGraphInstantiate(&runnable_, root_, 0));
    C10_CUDA_CHECK_WARN(cudaGraphUpload(runnable_, stream_));  // else the first replay uploads it
  }

  void replay() {
    EE_CHECK(runnable_ != nullptr, kOp, "expected replay after end");
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaGraphLaunch(runnable_, c10::cuda::getCurrentCUDAStream(device_)));
  }

  // Drop everything, and leave the stream as it was before, also in the middle of a capture that failed.
  void abandon() {
    if (allocates_) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      C10_CUDA_CHECK_WARN(cudaStreamIsCapturing(stream_, &status));
      cudaGraph_t unfinished = nullptr;
      // fails by design where the capture was invalidated
      if (status != cudaStreamCaptureStatusNone) (void)cudaStreamEndCapture(stream_, &unfinished);
      (void)cudaGetLastError();
      stop_allocating();
    }
    if (runnable_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(runnable_));
    if (root_ != nullptr) C10_CUDA_CHECK_WARN(cudaGraphDestroy(root_));
    if (holds_pool_) c10::cuda::CUDACachingAllocator::releasePool(device_, pool_);
    runnable_ = nullptr;
    root_ = nullptr;
    holds_pool_ = false;
    open_.clear();
  }

 private:
  struct Node {
    cudaGraph_t parent;
    cudaGraphNode_t node;
    std::vector<cudaGraph_t> bodies;
    size_t entered;
  };

  void open(int64_t handle, cudaGraphConditionalNodeType type, int64_t bodies) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* before;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = static_cast<cudaGraphConditionalHandle>(handle);
    params.conditional.type = type;
    params.conditional.size = static_cast<unsigned>(bodies);
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, nullptr, &graph, &before, &edges, &count));
#else
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream_, &status, nullptr, &graph, &before, &edges, &count));
#endif
    EE_CHECK(status == cudaStreamCaptureStatusActive, kOp, "expected a node between begin and end");
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaGraphAddNode(&node, graph, before, edges, count, &params));
#else
    C10_CUDA_CHECK(cudaGraphAddNode_v2(&node, graph, before, edges, count, &params));
#endif
    pause();
    const cudaGraph_t* made = params.conditional.phGraph_out;
    open_.push_back({graph, node, {made, made + bodies}, 0});
    enter_body();
  }

  void enter_body() { capture(open_.back().bodies[open_.back().entered++], nullptr); }

  void capture(cudaGraph_t into, const cudaGraphNode_t* behind) {
    C10_CUDA_CHECK(cudaStreamBeginCaptureToGraph(
        stream_, into, behind, nullptr, behind == nullptr ? 0 : 1, cudaStreamCaptureModeThreadLocal));
  }

  void pause() {
    cudaGraph_t same;
    C10_CUDA_CHECK(cudaStreamEndCapture(stream_, &same));
  }

  void stop_allocating() {
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_);
    allocates_ = false;
  }

  c10::DeviceIndex device_ = 0;
  c10::cuda::CUDAStream stream_ = c10::cuda::getDefaultCUDAStream();
  c10::cuda::MempoolId_t pool_{};
  cudaGraph_t root_ = nullptr;
  cudaGraphExec_t runnable_ = nullptr;
  std::vector<Node> open_;
  bool holds_pool_ = false;
  bool allocates_ = false;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(earlyexit_kernels, library) {
  library.class_<ConditionalGraph>("ConditionalGraph")
      .def(torch::init<>())
      .def("begin", &ConditionalGraph::begin)
      .def("handle", &ConditionalGraph::handle, "", {torch::arg("first") = 0})
      .def("begin_if", &ConditionalGraph::begin_if)
      .def("end_if", &ConditionalGraph::close)
      .def("begin_while", &ConditionalGraph::begin_while)
      .def("end_while", &ConditionalGraph::close)
      .def("has_switch", &ConditionalGraph::has_switch)
      .def("begin_switch", &ConditionalGraph::begin_switch)
      .def("next_case", &ConditionalGraph::next_case)
      .def("end_switch", &ConditionalGraph::close)
      .def("take_turn", &ConditionalGraph::take_turn)
      .def("end", &ConditionalGraph::end)
      .def("replay", &ConditionalGraph::replay)
      .def("abandon", &ConditionalGraph::abandon);
}

}  // namespace earlyexit
