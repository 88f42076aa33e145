package rpc

import (
	"context"
	"strconv"

	"github.com/dunlin/dunlin/agent/oip"
	"github.com/dunlin/dunlin/models/tensor"
	"github.com/dunlin/dunlin/proto/inference"
)

func (s *service) ServerLive(context.Context, *inference.ServerLiveRequest) (*inference.ServerLiveResponse, error) {
	return &inference.ServerLiveResponse{Live: true}, nil
}

func (s *service) ServerReady(ctx context.Context, _ *inference.ServerReadyRequest) (*inference.ServerReadyResponse, error) {
	return &inference.ServerReadyResponse{Ready: s.oip.Ready(ctx) == nil}, nil
}

func (s *service) ModelReady(ctx context.Context, q *inference.ModelReadyRequest) (*inference.ModelReadyResponse, error) {
	version, err := parseVersion(q.Version)
	if err != nil {
		return nil, err
	}
	err = s.oip.ModelReady(ctx, q.Name, version)
	switch code := oip.CodeOf(err); {
	case err == nil:
		return &inference.ModelReadyResponse{Ready: true}, nil
	case code == oip.NotReady, code == oip.NotFound: // what is not there is not ready, as Triton has it
		return &inference.ModelReadyResponse{}, nil
	default:
		return nil, err
	}
}

func (s *service) ServerMetadata(context.Context, *inference.ServerMetadataRequest) (*inference.ServerMetadataResponse, error) {
	return s.oip.Metadata(), nil
}

func (s *service) model(ctx context.Context, name, version string) (oip.Model, error) {
	v, err := parseVersion(version)
	if err != nil {
		return oip.Model{}, err
	}
	return s.oip.Model(ctx, name, v)
}

func (s *service) ModelMetadata(ctx context.Context, q *inference.ModelMetadataRequest) (*inference.ModelMetadataResponse, error) {
	m, err := s.model(ctx, q.Name, q.Version)
	if err != nil {
		return nil, err
	}
	versions := make([]string, len(m.Versions))
	for i, v := range m.Versions {
		versions[i] = strconv.FormatInt(v, 10)
	}
	return &inference.ModelMetadataResponse{
		Name: m.Name, Versions: versions, Platform: "onnxruntime_onnx",
		Inputs: tensorMetadata(m.Inputs), Outputs: tensorMetadata(m.Outputs),
	}, nil
}

func tensorMetadata(infos []tensor.Info) []*inference.ModelMetadataResponse_TensorMetadata {
	list := make([]*inference.ModelMetadataResponse_TensorMetadata, len(infos))
	for i, t := range infos {
		list[i] = &inference.ModelMetadataResponse_TensorMetadata{Name: t.Name, Datatype: t.Type.String(), Shape: t.Shape}
	}
	return list
}

func (s *service) ModelConfig(ctx context.Context, q *inference.ModelConfigRequest) (*inference.ModelConfigResponse, error) {
	m, err := s.model(ctx, q.Name, q.Version)
	if err != nil {
		return nil, err
	}
	return &inference.ModelConfigResponse{Config: m.Config}, nil
}

func (s *service) ModelStatistics(ctx context.Context, q *inference.ModelStatisticsRequest) (*inference.ModelStatisticsResponse, error) {
	version, err := parseVersion(q.Version)
	if err != nil {
		return nil, err
	}
	list, err := s.oip.Statistics(ctx, q.Name, version)
	if err != nil {
		return nil, err
	}
	return &inference.ModelStatisticsResponse{ModelStats: list}, nil
}

// theRepository refuses the name of a repository: there is one at most, which
// has none.
func theRepository(name string) error {
	if name != "" {
		return oip.Errorf(oip.Unsupported, "repository_name is %q, it must be empty", clip(name))
	}
	return nil
}

func (s *service) RepositoryIndex(ctx context.Context, q *inference.RepositoryIndexRequest) (*inference.RepositoryIndexResponse, error) {
	if err := theRepository(q.RepositoryName); err != nil {
		return nil, err
	}
	list, err := s.oip.Index(ctx, q.Ready)
	if err != nil {
		return nil, err
	}
	return &inference.RepositoryIndexResponse{Models: list}, nil
}

func (s *service) RepositoryModelLoad(ctx context.Context, q *inference.RepositoryModelLoadRequest) (*inference.RepositoryModelLoadResponse, error) {
	if err := theRepository(q.RepositoryName); err != nil {
		return nil, err
	}
	if err := s.oip.Load(ctx, q.ModelName, q.Parameters); err != nil {
		return nil, err
	}
	return &inference.RepositoryModelLoadResponse{}, nil
}

func (s *service) RepositoryModelUnload(ctx context.Context, q *inference.RepositoryModelUnloadRequest) (*inference.RepositoryModelUnloadResponse, error) {
	if err := theRepository(q.RepositoryName); err != nil {
		return nil, err
	}
	if err := s.oip.Unload(ctx, q.ModelName, q.Parameters); err != nil {
		return nil, err
	}
	return &inference.RepositoryModelUnloadResponse{}, nil
}

func (s *service) SystemSharedMemoryStatus(_ context.Context, q *inference.SystemSharedMemoryStatusRequest) (*inference.SystemSharedMemoryStatusResponse, error) {
	regions, err := s.oip.Memory(q.Name)
	if err != nil {
		return nil, err
	}
	return &inference.SystemSharedMemoryStatusResponse{Regions: regions}, nil
}

func (s *service) SystemSharedMemoryRegister(_ context.Context, q *inference.SystemSharedMemoryRegisterRequest) (*inference.SystemSharedMemoryRegisterResponse, error) {
	if err := s.oip.RegisterMemory(q.Name, q.Key, q.Offset, q.ByteSize); err != nil {
		return nil, err
	}
	return &inference.SystemSharedMemoryRegisterResponse{}, nil
}

func (s *service) SystemSharedMemoryUnregister(_ context.Context, q *inference.SystemSharedMemoryUnregisterRequest) (*inference.SystemSharedMemoryUnregisterResponse, error) {
	if err := s.oip.UnregisterMemory(q.Name); err != nil {
		return nil, err
	}
	return &inference.SystemSharedMemoryUnregisterResponse{}, nil
}

func (s *service) CudaSharedMemoryStatus(_ context.Context, q *inference.CudaSharedMemoryStatusRequest) (*inference.CudaSharedMemoryStatusResponse, error) {
	if q.Name != "" {
		return nil, oip.Errorf(oip.NotFound, "no CUDA shared memory region %q", clip(q.Name))
	}
	return &inference.CudaSharedMemoryStatusResponse{}, nil
}

func (s *service) CudaSharedMemoryRegister(context.Context, *inference.CudaSharedMemoryRegisterRequest) (*inference.CudaSharedMemoryRegisterResponse, error) {
	return nil, oip.Errorf(oip.Unsupported, "CUDA shared memory is not supported")
}

// CudaSharedMemoryUnregister succeeds, as clients forget all regions before
// they begin, and there are none.
func (s *service) CudaSharedMemoryUnregister(context.Context, *inference.CudaSharedMemoryUnregisterRequest) (*inference.CudaSharedMemoryUnregisterResponse, error) {
	return &inference.CudaSharedMemoryUnregisterResponse{}, nil
}

func (s *service) TraceSetting(ctx context.Context, q *inference.TraceSettingRequest) (*inference.TraceSettingResponse, error) {
	var change map[string][]string
	for k, v := range q.Settings {
		if change == nil {
			change = map[string][]string{}
		}
		change[k] = v.GetValue()
	}
	settings, err := s.oip.TraceSettings(ctx, q.ModelName, change)
	if err != nil {
		return nil, err
	}
	answer := map[string]*inference.TraceSettingResponse_SettingValue{}
	for k, v := range settings {
		answer[k] = &inference.TraceSettingResponse_SettingValue{Value: v}
	}
	return &inference.TraceSettingResponse{Settings: answer}, nil
}

func (s *service) LogSettings(ctx context.Context, q *inference.LogSettingsRequest) (*inference.LogSettingsResponse, error) {
	var change map[string]any
	for k, v := range q.Settings {
		if change == nil {
			change = map[string]any{}
		}
		switch v := v.GetParameterChoice().(type) {
		case *inference.LogSettingsRequest_SettingValue_BoolParam:
			change[k] = v.BoolParam
		case *inference.LogSettingsRequest_SettingValue_Uint32Param:
			change[k] = v.Uint32Param
		case *inference.LogSettingsRequest_SettingValue_StringParam:
			change[k] = v.StringParam
		default:
			return nil, oip.Errorf(oip.InvalidArgument, "setting %q has no value", clip(k))
		}
	}
	settings, err := s.oip.LogSettings(ctx, change)
	if err != nil {
		return nil, err
	}
	answer := map[string]*inference.LogSettingsResponse_SettingValue{}
	for k, v := range settings {
		value := new(inference.LogSettingsResponse_SettingValue)
		switch v := v.(type) {
		case bool:
			value.ParameterChoice = &inference.LogSettingsResponse_SettingValue_BoolParam{BoolParam: v}
		case uint32:
			value.ParameterChoice = &inference.LogSettingsResponse_SettingValue_Uint32Param{Uint32Param: v}
		case string:
			value.ParameterChoice = &inference.LogSettingsResponse_SettingValue_StringParam{StringParam: v}
		}
		answer[k] = value
	}
	return &inference.LogSettingsResponse{Settings: answer}, nil
}
