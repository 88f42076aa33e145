// Package profiles holds the firmware profiles: what the agent takes for
// granted of each class of devices, and which class a device is of.
package profiles

// Profile describes one class of devices. Memory is in bytes, power in watts,
// temperatures in degrees Celsius; 0 and absent both mean that the class has
// no such figure, unless a field says otherwise.
type Profile struct {
	Name        string `yaml:"name"` // the same as the file's, a-z, 0-9 and - between them
	Description string `yaml:"description"`
	// Sources are the documents that the figures come from.
	Sources []string `yaml:"sources"`
	Match   Rule     `yaml:"match"`
	// Providers are ONNX Runtime's execution providers, the preferred first.
	Providers []Provider `yaml:"providers"`
	// Threads bounds the threads of a model's run; 0 means one for each core.
	Threads int `yaml:"threads"`
	// Affinity are the processors that runs may use, as "0-3,6"; "": all.
	Affinity string  `yaml:"affinity"`
	Memory   Memory  `yaml:"memory"`
	Storage  Storage `yaml:"storage"`
	// Telemetry are the sources of figures to look for: "nvml", "jetson",
	// "hwmon", "thermal", "rapl".
	Telemetry []string `yaml:"telemetry"`
	Power     Power    `yaml:"power"`
	Thermal   Thermal  `yaml:"thermal"`
	Link      Link     `yaml:"link"`
	Limits    Limits   `yaml:"limits"`
	Hardware  Hardware `yaml:"hardware"`
}

// Provider is an execution provider and its options, by the names that ONNX
// Runtime has for them.
type Provider struct {
	Name    string            `yaml:"name"`
	Options map[string]string `yaml:"options"`
}

// Rule says which devices a profile is for: those for which all that it names
// holds. Patterns are those of path.Match, and case does not count. A version
// pattern is a list of bounds that all hold, as ">=8.0, <9"; "8.9" alone means
// the versions whose first parts are those. Parts compare as numbers, and those
// that are missing count as 0.
type Rule struct {
	Arch              string   `yaml:"arch"`               // Go's name of the architecture
	DeviceTree        []string `yaml:"device_tree"`        // one of these: an entry of "compatible", or the model
	DMI               []string `yaml:"dmi"`                // one of these: "vendor/product"
	GPU               []string `yaml:"gpu"`                // one of these: the name of a GPU, as NVML has it
	ComputeCapability string   `yaml:"compute_capability"` // of that GPU, such as "8.9" or ">=8.0"
	Driver            string   `yaml:"driver"`             // version of the GPU's driver, such as ">=525"
	Runtime           string   `yaml:"runtime"`            // version of ONNX Runtime, such as ">=1.24"
}

// Memory bounds what models may take. Of a part and an absolute figure the
// smaller counts.
type Memory struct {
	HostFraction   float64 `yaml:"host_fraction"` // of the host's memory, above 0 to 1
	HostBytes      int64   `yaml:"host_bytes"`
	DeviceFraction float64 `yaml:"device_fraction"` // of what a GPU has free when the agent starts, 0 to 1; 0: as 0.95
	DeviceBytes    int64   `yaml:"device_bytes"`
	PinnedBytes    int64   `yaml:"pinned_bytes"` // host memory that a GPU reads
	Unified        bool    `yaml:"unified"`      // CPU and GPU share one memory
}

// Storage bounds what the agent keeps.
type Storage struct {
	ReserveBytes int64 `yaml:"reserve_bytes"` // left free on the disk
	OutboxEvents int   `yaml:"outbox_events"` // kept until the controller has them
}

// Power has the class's figures of power.
type Power struct {
	IdleWatts  float64 `yaml:"idle_watts"`
	LimitWatts float64 `yaml:"limit_watts"`
}

// Thermal has the temperatures at which something happens.
type Thermal struct {
	WarnCelsius     float64 `yaml:"warn_celsius"`
	SlowdownCelsius float64 `yaml:"slowdown_celsius"`
	ShutdownCelsius float64 `yaml:"shutdown_celsius"`
}

// Link bounds what a device loads over the network.
type Link struct {
	BytesPerDay    int64    `yaml:"bytes_per_day"`    // 0: no bound
	BytesPerMonth  int64    `yaml:"bytes_per_month"`  // 0: no bound
	BytesPerSecond int64    `yaml:"bytes_per_second"` // 0: no bound
	Metered        bool     `yaml:"metered"`          // bytes cost money: they travel where a deployment says so
	Windows        []string `yaml:"windows"`          // local times of day, as "01:00-05:30"; none: always
}

// Limits are the requirements on models.
type Limits struct {
	MaxOpset   int64    `yaml:"max_opset"`  // 0: no bound
	Precisions []string `yaml:"precisions"` // element types, as Triton names them; none: no bound
}

// Hardware is what a device of the class has: for predictions, and for
// simulated devices.
type Hardware struct {
	Cores              int     `yaml:"cores"`
	HostBytes          int64   `yaml:"host_bytes"`
	DeviceBytes        int64   `yaml:"device_bytes"`
	FP32GFLOPS         float64 `yaml:"fp32_gflops"`
	MemoryGBPerSecond  float64 `yaml:"memory_gb_per_second"`  // of the memory that models run in
	LinkGBPerSecond    float64 `yaml:"link_gb_per_second"`    // between host and GPU
	StorageMBPerSecond float64 `yaml:"storage_mb_per_second"` // sequential reads
	OverheadMicros     float64 `yaml:"overhead_micros"`       // of a run, whatever it does
}
