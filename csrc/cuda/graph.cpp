// A CUDA graph whose parts run only where a kernel before them said so: IF nodes, captured in segments on one stream.
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

  // A number for a kernel to set, 0 where none does: whether the body behind it runs.
  int64_t handle() {
    EE_CHECK(allocates_, kOp, "expected handle between begin and end");
    cudaGraphConditionalHandle made;
    C10_CUDA_CHECK(cudaGraphConditionalHandleCreate(&made, root_, 0, cudaGraphCondAssignDefault));
    EE_CHECK(made != 0, kOp, "expected a handle other than 0, which means none to the ops");
    return static_cast<int64_t>(made);
  }

  // What follows, up to end_if, runs where the handle isn't 0.
  void begin_if(int64_t handle) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* before;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = static_cast<cudaGraphConditionalHandle>(handle);
    params.conditional.type = cudaGraphCondTypeIf;
    params.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, nullptr, &graph, &before, &edges, &count));
#else
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream_, &status, nullptr, &graph, &before, &edges, &count));
#endif
    EE_CHECK(status == cudaStreamCaptureStatusActive, kOp, "expected begin_if between begin and end");
#if CUDART_VERSION >= 13000
    C10_CUDA_CHECK(cudaGraphAddNode(&node, graph, before, edges, count, &params));
#else
    C10_CUDA_CHECK(cudaGraphAddNode_v2(&node, graph, before, edges, count, &params));
#endif
    pause();
    open_.push_back({graph, node});
    capture(params.conditional.phGraph_out[0], nullptr);
  }

  void end_if() {
    EE_CHECK(!open_.empty(), kOp, "expected end_if after begin_if");
    pause();
    const Node node = open_.back();
    open_.pop_back();
    capture(node.parent, &node.node);
  }

  void end() {
    EE_CHECK(allocates_ && open_.empty(), kOp, "expected end after begin and the last end_if");
    pause();
    stop_allocating();
    C10_CUDA_CHECK(cudaGraphInstantiate(&runnable_, root_, 0));
    C10_CUDA_CHECK(cudaGraphUpload(runnable_, stream_));
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
  };

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
      .def("handle", &ConditionalGraph::handle)
      .def("begin_if", &ConditionalGraph::begin_if)
      .def("end_if", &ConditionalGraph::end_if)
      .def("end", &ConditionalGraph::end)
      .def("replay", &ConditionalGraph::replay)
      .def("abandon", &ConditionalGraph::abandon);
}

}  // namespace earlyexit
