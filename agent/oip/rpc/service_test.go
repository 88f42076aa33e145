package rpc

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/proto/inference"
)

// shelf is a repository that remembers what it was asked.
type shelf struct {
	load, unload string
	override     oip.Override
}

func (s *shelf) Index(context.Context) ([]*inference.RepositoryIndexResponse_ModelIndex, error) {
	return []*inference.RepositoryIndexResponse_ModelIndex{
		{Name: "echo", Version: "2", State: "READY"}, {Name: "other", Version: "1", State: "UNAVAILABLE", Reason: "unloaded"},
	}, nil
}

func (s *shelf) Load(_ context.Context, model string, o oip.Override) error {
	s.load, s.override = model, o
	return nil
}

func (s *shelf) Unload(_ context.Context, model string) error {
	s.unload = model
	return nil
}

// call makes one call of the service, by name.
func call[P any](t *testing.T, conn grpc.ClientConnInterface, method string, q proto.Message) (*P, error) {
	t.Helper()
	p := new(P)
	return p, conn.Invoke(t.Context(), "/inference.GRPCInferenceService/"+method, q, p)
}

// want makes a call that must be answered so.
func want[P any](t *testing.T, conn grpc.ClientConnInterface, method string, q proto.Message, answer *P) {
	t.Helper()
	got, err := call[P](t, conn, method, q)
	if err != nil {
		t.Errorf("%s: %v", method, err)
		return
	}
	diff(t, any(got).(proto.Message), any(answer).(proto.Message))
}

func refused(t *testing.T, conn grpc.ClientConnInterface, method string, q proto.Message, code codes.Code) {
	t.Helper()
	_, err := call[inference.ServerLiveResponse](t, conn, method, q)
	wantCode(t, err, code)
}

func TestMethods(t *testing.T) {
	b, repository := &echo{}, &shelf{}
	conn := serve(t, oip.Config{Backend: b, Repository: repository, Version: "1.2", SharedMemory: true, TraceFile: filepath.Join(t.TempDir(), "trace")}, nil)

	want(t, conn, "ServerLive", &inference.ServerLiveRequest{}, &inference.ServerLiveResponse{Live: true})
	want(t, conn, "ServerReady", &inference.ServerReadyRequest{}, &inference.ServerReadyResponse{Ready: true})
	b.err = errors.New("starting")
	want(t, conn, "ServerReady", &inference.ServerReadyRequest{}, &inference.ServerReadyResponse{})
	b.err = nil
	want(t, conn, "ModelReady", &inference.ModelReadyRequest{Name: "echo"}, &inference.ModelReadyResponse{Ready: true})
	want(t, conn, "ModelReady", &inference.ModelReadyRequest{Name: "none"}, &inference.ModelReadyResponse{})
	refused(t, conn, "ModelReady", &inference.ModelReadyRequest{Name: "echo", Version: "x"}, codes.InvalidArgument)
	b.notReady = "loading"
	want(t, conn, "ModelReady", &inference.ModelReadyRequest{Name: "echo"}, &inference.ModelReadyResponse{})
	refused(t, conn, "ModelMetadata", &inference.ModelMetadataRequest{Name: "echo"}, codes.Unavailable)
	b.notReady = ""

	metadata, err := call[inference.ServerMetadataResponse](t, conn, "ServerMetadata", &inference.ServerMetadataRequest{})
	if err != nil || metadata.Name != "dunlin" || metadata.Version != "1.2" || len(metadata.Extensions) == 0 {
		t.Errorf("got %v, %v", metadata, err)
	}
	x := []*inference.ModelMetadataResponse_TensorMetadata{{Name: "x", Datatype: "FP32", Shape: []int64{-1, 2}}}
	want(t, conn, "ModelMetadata", &inference.ModelMetadataRequest{Name: "echo", Version: "2"},
		&inference.ModelMetadataResponse{Name: "echo", Versions: []string{"1", "2"}, Platform: "onnxruntime_onnx", Inputs: x, Outputs: x})
	refused(t, conn, "ModelMetadata", &inference.ModelMetadataRequest{Name: "echo", Version: "-1"}, codes.InvalidArgument)
	want(t, conn, "ModelConfig", &inference.ModelConfigRequest{Name: "echo"},
		&inference.ModelConfigResponse{Config: &inference.ModelConfig{Name: "echo", MaxBatchSize: 8}})
	refused(t, conn, "ModelConfig", &inference.ModelConfigRequest{Name: "none"}, codes.NotFound)
	want(t, conn, "ModelStatistics", &inference.ModelStatisticsRequest{Name: "echo"},
		&inference.ModelStatisticsResponse{ModelStats: []*inference.ModelStatistics{{Name: "echo", Version: "2", InferenceCount: 7}}})
	refused(t, conn, "ModelStatistics", &inference.ModelStatisticsRequest{Version: "x"}, codes.InvalidArgument)

	index := func(ready bool) int {
		list, err := call[inference.RepositoryIndexResponse](t, conn, "RepositoryIndex", &inference.RepositoryIndexRequest{Ready: ready})
		if err != nil {
			t.Error(err)
		}
		return len(list.Models)
	}
	if all, ready := index(false), index(true); all != 2 || ready != 1 {
		t.Errorf("%d models, %d ready; want 2 and 1", all, ready)
	}
	parameters := map[string]*inference.ModelRepositoryParameter{
		"config":            {ParameterChoice: &inference.ModelRepositoryParameter_StringParam{StringParam: "{}"}},
		"file:1/model.onnx": {ParameterChoice: &inference.ModelRepositoryParameter_BytesParam{BytesParam: bytesOf(3 << 20)}},
	}
	want(t, conn, "RepositoryModelLoad", &inference.RepositoryModelLoadRequest{ModelName: "echo", Parameters: parameters}, &inference.RepositoryModelLoadResponse{})
	if repository.load != "echo" || len(repository.override.Files["1/model.onnx"]) != 3<<20 {
		t.Errorf("loaded %q with %d files", repository.load, len(repository.override.Files))
	}
	want(t, conn, "RepositoryModelUnload", &inference.RepositoryModelUnloadRequest{ModelName: "echo"}, &inference.RepositoryModelUnloadResponse{})
	if repository.unload != "echo" {
		t.Errorf("unloaded %q", repository.unload)
	}
	refused(t, conn, "RepositoryIndex", &inference.RepositoryIndexRequest{RepositoryName: "r"}, codes.Unimplemented)
	refused(t, conn, "RepositoryModelLoad", &inference.RepositoryModelLoadRequest{RepositoryName: "r"}, codes.Unimplemented)
	refused(t, conn, "RepositoryModelUnload", &inference.RepositoryModelUnloadRequest{RepositoryName: "r"}, codes.Unimplemented)

	want(t, conn, "CudaSharedMemoryStatus", &inference.CudaSharedMemoryStatusRequest{}, &inference.CudaSharedMemoryStatusResponse{})
	refused(t, conn, "CudaSharedMemoryStatus", &inference.CudaSharedMemoryStatusRequest{Name: "r"}, codes.NotFound)
	refused(t, conn, "CudaSharedMemoryRegister", &inference.CudaSharedMemoryRegisterRequest{Name: "r"}, codes.Unimplemented)
	want(t, conn, "CudaSharedMemoryUnregister", &inference.CudaSharedMemoryUnregisterRequest{}, &inference.CudaSharedMemoryUnregisterResponse{})

	settings, err := call[inference.TraceSettingResponse](t, conn, "TraceSetting", &inference.TraceSettingRequest{
		Settings: map[string]*inference.TraceSettingRequest_SettingValue{"trace_rate": {Value: []string{"9"}}}})
	if err != nil || settings.Settings["trace_rate"].GetValue()[0] != "9" {
		t.Errorf("got %v, %v", settings, err)
	}
	refused(t, conn, "TraceSetting", &inference.TraceSettingRequest{
		Settings: map[string]*inference.TraceSettingRequest_SettingValue{"trace_rate": {Value: []string{"often"}}}}, codes.InvalidArgument)
	logs, err := call[inference.LogSettingsResponse](t, conn, "LogSettings", &inference.LogSettingsRequest{})
	if err != nil || len(logs.Settings) == 0 {
		t.Errorf("got %v, %v", logs, err)
	}
	for name, v := range logs.Settings {
		if v.ParameterChoice == nil {
			t.Errorf("setting %q has no value", name)
		}
	}
	refused(t, conn, "LogSettings", &inference.LogSettingsRequest{
		Settings: map[string]*inference.LogSettingsRequest_SettingValue{"log_info": {}}}, codes.InvalidArgument)
}

func TestSharedMemory(t *testing.T) {
	const key = "/dunlin-rpc-test"
	data := bytesOf(64)
	if err := os.WriteFile("/dev/shm"+key, data, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove("/dev/shm" + key) })
	conn := serve(t, oip.Config{Backend: &echo{}, SharedMemory: true}, nil)
	want(t, conn, "SystemSharedMemoryRegister", &inference.SystemSharedMemoryRegisterRequest{Name: "r", Key: key, ByteSize: 64}, &inference.SystemSharedMemoryRegisterResponse{})
	want(t, conn, "SystemSharedMemoryStatus", &inference.SystemSharedMemoryStatusRequest{Name: "r"}, &inference.SystemSharedMemoryStatusResponse{
		Regions: map[string]*inference.SystemSharedMemoryStatusResponse_RegionStatus{"r": {Name: "r", Key: key, ByteSize: 64}}})
	part := func(offset int64) map[string]*parameter {
		return map[string]*parameter{"shared_memory_region": textParam("r"), "shared_memory_byte_size": intParam(8), "shared_memory_offset": intParam(offset)}
	}
	// The first is answered, the second goes from memory to memory; only the
	// first and the third have raw contents.
	q := &inference.ModelInferRequest{ModelName: "echo", Inputs: []*inputTensor{
		{Name: "a", Datatype: "UINT8", Shape: []int64{2}},
		{Name: "b", Datatype: "FP64", Shape: []int64{1}, Parameters: part(16)},
		{Name: "c", Datatype: "UINT8", Shape: []int64{1}},
	}, RawInputContents: [][]byte{{1, 2}, {3}}, Outputs: []*outputTensor{{Name: "a"}, {Name: "b", Parameters: part(32)}, {Name: "c"}}}
	p, err := inference.NewGRPCInferenceServiceClient(conn).ModelInfer(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	diff(t, p, &inference.ModelInferResponse{ModelName: "echo", ModelVersion: "2", Outputs: []*inference.ModelInferResponse_InferOutputTensor{
		{Name: "a", Datatype: "UINT8", Shape: []int64{2}},
		{Name: "b", Datatype: "FP64", Shape: []int64{1}, Parameters: part(32)},
		{Name: "c", Datatype: "UINT8", Shape: []int64{1}},
	}, RawOutputContents: [][]byte{{1, 2}, {}, {3}}})
	after, err := os.ReadFile("/dev/shm" + key)
	if err != nil || string(after[32:40]) != string(data[16:24]) {
		t.Errorf("memory holds % x, want % x; %v", after[32:40], data[16:24], err)
	}
	want(t, conn, "SystemSharedMemoryUnregister", &inference.SystemSharedMemoryUnregisterRequest{Name: "r"}, &inference.SystemSharedMemoryUnregisterResponse{})
	refused(t, conn, "SystemSharedMemoryStatus", &inference.SystemSharedMemoryStatusRequest{Name: "r"}, codes.NotFound)
}

func TestHealth(t *testing.T) {
	b := &echo{}
	conn := serve(t, oip.Config{Backend: b}, nil)
	c := healthpb.NewHealthClient(conn)
	check := func(service string, want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		p, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || p.Status != want {
			t.Errorf("%q: got %v, %v, want %v", service, p, err, want)
		}
	}
	check("", healthpb.HealthCheckResponse_SERVING)
	check("echo", healthpb.HealthCheckResponse_SERVING)
	b.notReady = "loading"
	check("echo", healthpb.HealthCheckResponse_NOT_SERVING)
	b.err = errors.New("starting")
	check("", healthpb.HealthCheckResponse_NOT_SERVING)
	_, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "none"})
	wantCode(t, err, codes.NotFound)
	list, err := c.List(t.Context(), &healthpb.HealthListRequest{})
	if err != nil || list.Statuses[""].GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("got %v, %v", list, err)
	}
}

func TestWatch(t *testing.T) {
	b := &switched{echo: &echo{}}
	b.ready.Store(true)
	conn := serve(t, oip.Config{Backend: b}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		p, err := watch.Recv()
		if err != nil || p.Status != want {
			t.Fatalf("got %v, %v, want %v", p, err, want)
		}
		b.ready.Store(false)
	}
	cancel()
	_, err = watch.Recv()
	wantCode(t, err, codes.Canceled)
	watch, err = healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{Service: "none"})
	if err != nil {
		t.Fatal(err)
	}
	if p, err := watch.Recv(); err != nil || p.Status != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		t.Errorf("got %v, %v", p, err)
	}
}
