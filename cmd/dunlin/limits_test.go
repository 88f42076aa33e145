package main

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dunlin/dunlin/agent"
	"github.com/dunlin/dunlin/controller"
)

// constants evaluates the named constants of packages from their source:
// exported or not, and whichever program they are of.
type constants struct {
	t     *testing.T
	specs map[string]map[string]ast.Expr // by folder and name
	files map[string]map[string]string   // folders of the module's packages that a folder imports, by name
}

func (c *constants) load(folder string) {
	if c.specs[folder] != nil {
		return
	}
	c.specs[folder], c.files[folder] = map[string]ast.Expr{}, map[string]string{}
	paths, err := filepath.Glob(filepath.Join("../..", folder, "*.go"))
	if err != nil || len(paths) == 0 {
		c.t.Fatalf("no Go files in %s: %v", folder, err)
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			c.t.Fatal(err)
		}
		for _, i := range file.Imports {
			path, _ := strconv.Unquote(i.Path.Value)
			if rest, ok := strings.CutPrefix(path, "github.com/dunlin/dunlin/"); ok {
				c.files[folder][filepath.Base(rest)] = rest
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			g, ok := n.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				return true
			}
			for _, s := range g.Specs {
				s := s.(*ast.ValueSpec)
				for i, name := range s.Names {
					if i < len(s.Values) {
						c.specs[folder][name.Name] = s.Values[i]
					}
				}
			}
			return true
		})
	}
}

// value gives a constant by "folder.Name".
func (c *constants) value(name string) (int64, error) {
	at := strings.LastIndex(name, ".")
	v, err := c.named(name[:at], name[at+1:])
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	n, exact := constant.Int64Val(constant.ToInt(v))
	if !exact {
		return 0, fmt.Errorf("%s is %s", name, v)
	}
	return n, nil
}

func (c *constants) named(folder, name string) (constant.Value, error) {
	c.load(folder)
	e, ok := c.specs[folder][name]
	if !ok {
		return nil, fmt.Errorf("package %s has no constant %s", folder, name)
	}
	return c.eval(folder, e)
}

var durations = map[string]time.Duration{
	"Nanosecond": 1, "Microsecond": time.Microsecond, "Millisecond": time.Millisecond, "Second": time.Second, "Minute": time.Minute, "Hour": time.Hour,
}

func (c *constants) eval(folder string, e ast.Expr) (constant.Value, error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		return constant.MakeFromLiteral(e.Value, e.Kind, 0), nil
	case *ast.ParenExpr:
		return c.eval(folder, e.X)
	case *ast.Ident:
		return c.named(folder, e.Name)
	case *ast.SelectorExpr:
		in := e.X.(*ast.Ident).Name
		if d, ok := durations[e.Sel.Name]; ok && in == "time" {
			return constant.MakeInt64(int64(d)), nil
		}
		if e.Sel.Name == "MaxInt32" {
			return constant.MakeInt64(1<<31 - 1), nil
		}
		return c.named(c.files[folder][in], e.Sel.Name)
	case *ast.BinaryExpr:
		x, err := c.eval(folder, e.X)
		if err != nil {
			return nil, err
		}
		y, err := c.eval(folder, e.Y)
		if err != nil {
			return nil, err
		}
		switch e.Op {
		case token.SHL:
			n, _ := constant.Uint64Val(y)
			return constant.Shift(x, token.SHL, uint(n)), nil
		case token.QUO:
			return constant.BinaryOp(x, token.QUO_ASSIGN, y), nil
		}
		return constant.BinaryOp(x, e.Op, y), nil
	case *ast.CallExpr: // a conversion, or the lesser of some
		var least constant.Value
		for _, a := range e.Args {
			v, err := c.eval(folder, a)
			if err != nil {
				continue
			}
			if least == nil || constant.Compare(v, token.LSS, least) {
				least = v
			}
		}
		if least != nil {
			return least, nil
		}
	}
	return nil, fmt.Errorf("%T is not understood", e)
}

// written gives the ways in which the page may write a figure.
func written(n int64, unit string) (forms []string) {
	if unit == "time" {
		d := time.Duration(n)
		for _, u := range []struct {
			of   time.Duration
			name string
		}{{24 * time.Hour, "days"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}, {time.Millisecond, "ms"}} {
			if d >= u.of && d%u.of == 0 {
				forms = append(forms, fmt.Sprintf("%d %s", d/u.of, u.name))
			}
		}
		return append(forms, strings.TrimSuffix(strconv.FormatFloat(d.Seconds(), 'f', -1, 64), ".0")+" s")
	}
	forms = []string{strconv.FormatInt(n, 10)}
	if n%1_000_000 == 0 {
		forms = append(forms, fmt.Sprintf("%d million", n/1_000_000))
	}
	for i, u := range []string{"KiB", "MiB", "GiB"} {
		if by := int64(1) << (10 * (i + 1)); n >= by && n%by == 0 {
			forms = append(forms, fmt.Sprintf("%d %s", n/by, u), fmt.Sprintf("%d to ", n/by), fmt.Sprintf("%d each", n/by))
		}
	}
	if n == 1<<31-1 {
		forms = append(forms, "2 GiB - 1 byte")
	}
	return forms
}

// limits has the constants behind each row of docs/limits.md, in any order;
// after a colon "time" where the figure is a duration.
var limits = map[string]string{
	"bundle":                                        "models.MaxBundleBytes models.MaxFiles",
	"manifest / config / chunk index":               "models.MaxManifestBytes models.MaxConfigBytes models.MaxIndexBytes",
	"reference of a version":                        "models.MaxReferenceBytes",
	"chunk":                                         "models.MaxChunk models.averageChunk",
	"version asked for at push":                     "models.MaxVersion",
	"path in a bundle / other text":                 "models.maxPath models.maxString",
	"inputs, outputs / dimensions":                  "models.maxValues models.maxRank",
	"operators / operator sets / class labels":      "models.maxOperators models.maxOpsets models.maxLabels",
	"nodes, tensors / graphs in graphs":             "models.maxNodes models.maxDepth",
	"documents applied at once":                     "controller/fleet.MaxDocumentsBytes controller/fleet.MaxDocuments",
	"one document":                                  "controller/fleet.MaxDocumentBytes controller/fleet.MaxTokens",
	"faults shown of a document":                    "controller/fleet.maxFaults",
	"targets of a route, and of each rule / weight": "internal/policy.MaxTargets internal/policy.MaxWeight",
	"rules of a route / conditions of one kind / values of a condition": "internal/policy.MaxRules internal/policy.MaxConditions internal/policy.MaxValues internal/policy.MaxValueBytes",
	"parameters and headers that a route names":                         "internal/policy.MaxNames internal/policy.MaxNameBytes",
	"expression / its cost / pattern of `matches`":                      "internal/policy.MaxExpression internal/policy.MaxCost internal/policy.MaxPattern",
	"parameters, headers or inputs that an expression sees":             "internal/policy.MaxEntries internal/policy.MaxEntryText",
	"`maxFailed` / `deadline`":                                          "controller/fleet.MaxFailedLimit controller/fleet.MaxDeadline:time",
	"uses of a join token / validity":                                   "controller/api.maxUses controller/api.maxValidFor:time",
	"request, unpacked; its inputs in shared memory":                    "agent/oip.DefaultMaxBody",
	"bodies of all requests at a time, with what is unpacked of them":   "agent/oip.DefaultMaxBodies",
	"calls of one gRPC connection / requests at work of one stream":     "agent/oip/rpc.maxStreams agent/oip/rpc.maxPipelined",
	"error in gRPC": "agent/oip/rpc.maxMessage",
	"inputs, requested outputs / dimensions / nesting of JSON":               "agent/oip.MaxTensors agent/oip.MaxDims agent/oip/rest.maxNesting",
	"name of a model in a request, of a tensor, id":                          "agent/oip.MaxName",
	"classes in a row that is classified":                                    "agent/oip.maxClasses",
	"requests that wait for one version and priority":                        "models/serving.DefaultQueueSize models/serving.MaxQueueSize",
	"rows of a run / runs of one version at a time":                          "models/serving.MaxBatchSize models/serving.MaxInstances",
	"priorities / preferred sizes / time-outs, delays, ageing":               "models/serving.MaxPriorityLevels models/serving.MaxPreferred models/serving.MaxDuration:time",
	"batch sizes in the statistics":                                          "agent/engine.maxBatches",
	"connections to both ports together":                                     "agent.maxConnections",
	"API keys":                                                               "agent/access.maxRules agent/access.minKey agent/access.maxFile",
	"regions of shared memory":                                               "agent/oip.MaxRegions",
	"tensors of a request, and of its answer":                                "agent/worker.DefaultMaxBytes",
	"memory shared with the worker":                                          "agent/worker.DefaultSharedBytes",
	"trace files":                                                            "agent/oip.MaxTraceFile agent/oip.MaxTraceFiles",
	"models with trace settings of their own":                                "agent/oip.maxTracedModels",
	"models in a folder / versions of one that are loaded / loads at a time": "agent/repository.maxModels agent/repository.maxVersions agent/repository.maxLoading",
	"name of a model in a folder":                                            "agent/repository.maxName",
	"files in the folder of a version / folders in folders":                  "agent/repository.maxFiles agent/repository.maxDepth",
	"`config.pbtxt`, `config` of a load":                                     "models/triton.MaxConfigBytes",
	"file with labels":                                                       "agent/repository.maxLabelBytes agent/repository.maxLabels",
	"loads and unloads of clients that wait or are at work":                  "agent/repository.maxPending",
	"`file:` parameters of a load":                                           "agent/oip.maxFiles agent/repository.maxStagedPath",
	"`--poll-seconds` / `--threads`":                                         "agent.maxPoll agent.maxThreads",
	"`--memory-mib` / `--cache-mib`":                                         "agent.maxMemoryMiB agent.maxCacheMiB",
	"weights of a model that is compiled":                                    "agent/ort.MaxCompiled",
	"MQTT message":                                                           "internal/link.MaxPayload",
	"desired document inside a message":                                      "internal/link.MaxInlineDocument internal/link.MaxBlock",
	"name of a device":                                                       "internal/link.MaxDeviceName",
	"connections to the embedded broker, without those that only fetch":      "controller/broker.defaultMaxConnections",
	"devices that fetch models over MQTT at one time":                        "controller/broker.maxFetching",
	"agent's outbox":                                                         "agent/state.DefaultOutboxEvents agent/state.DefaultOutboxBytes",
	"event / its message":                                                    "agent/state.MaxEvent agent/state.MaxMessage",
	"events in one message":                                                  "agent/state.MaxBatchBytes",
	"events kept for each device":                                            "controller/store.MaxEvents",
	"audit records kept":                                                     "controller/store.MaxAudit",
	"samples of telemetry kept":                                              "controller/store.MaxTelemetry",
	"samples shown":                                                          "controller/api.defaultSamples controller/api.maxSamples",
	"versions in a report":                                                   "controller/dispatch.maxVersions",
	"events shown":                                                           "controller/api.defaultEvents controller/api.maxEvents",
	"messages that wait in the controller":                                   "controller/dispatch.workers controller/dispatch.queueLimit",
	"ONNX file":                                                              "agent/ort.MaxCompiled",
	"configuration file":                                                     "internal/program.maxFile",
	"gRPC handshake / pings of a client":                                     "agent/oip/rpc.connectTimeout:time agent/oip/rpc.minPingInterval:time",
	"time for a request to arrive, and for an answer to be taken":            "agent/oip/rest.slowTime:time agent/oip/rest.slowRate agent/oip/rpc.transferRate agent/oip/rpc.transferAbove",
	"gRPC message of another method":                                         "agent/oip/rpc.maxControl",
	"runs of all versions at a time":                                         "agent/worker.maxRunning",
	"run that was cancelled":                                                 "agent/worker.grace:time",
	"idle REST connection / body that nothing reads":                         "agent.unreadTime:time",
	"stop of the controller, of the agent":                                   "controller.stopGrace:time agent/oip/rpc.stopGrace:time",
	"trial of a version in a process of its own":                             "agent/worker.CheckLimit:time",
	"wait before a load is tried again that failed for want of the runtime":  "agent/reconcile.firstRetry:time agent/reconcile.lastRetry:time",
	"one ranged request to the registry":                                     "agent/reconcile.mostRange",
	"run without progress":                                                   "agent/worker.DefaultStallGrace:time",
	"wait before the worker is started again":                                "agent/worker.maxPause:time agent/worker.maxBackoff:time",
	"keepalive":                             "internal/link.DefaultKeepAlive:time",
	"sign of life after something was said": "internal/link.probePatience:time internal/link.mostPatience:time",
	"opening of a device's session: TLS, CONNECT, SUBSCRIBE each":              "internal/link.leastOpening:time internal/link.openingStep:time internal/link.mostOpening:time",
	"wait before a new connection":                                             "internal/link.DefaultMaxBackoff:time internal/link.briefBackoff:time",
	"time for a whole CONNECT, handshake included":                             "controller/broker.connectTimeout:time",
	"first byte, TLS handshake, headers of a request to the controller's port": "controller.openTimeout:time",
	"telemetry":                                                      "agent/follow.telemetryEvery:time",
	"call to the controller":                                         "cmd/dunlin.callTimeout:time cmd/dunlin.registerTimeout:time",
	"one step of a push / tries in a row":                            "cmd/dunlin.stepTimeout:time",
	"file of an input, answer":                                       "cmd/dunlin.maxTensorFile cmd/dunlin.maxInferResponse",
	"`dunlin rollout status --wait` without `--timeout`":             "cmd/dunlin.watchGrace:time",
	"unfinished uploads in the registry":                             "controller/registry.uploadAge:time",
	"versions that are compiled / come in / are prepacked at a time": "agent/engine.maxEntering",
	"labels of a device or selector":                                 "controller/fleet.MaxLabels controller/fleet.MaxLabelKey controller/fleet.MaxLabelValue",
	"name of a model, deployment or route":                           "models.maxModelName",
	"firmware profiles in a folder / size of one":                    "firmware-profiles.maxFileBytes",
}

// unheld are the rows whose figures are no constants with a name: they are
// computed, or written where they are used.
var unheld = []string{
	"rest of a refused body that is read",
	"headers of a request",
	"raw binary request",
	"memory / processor time of the process that compiles",
	"weights, session and workspace of a version",
	"wait before weights are brought in again that could not be",
	"wait before a failed download is tried again",
	"free disk kept in reserve",
	"deaths of the worker with a version at work, without a run of it that succeeds between",
	"weights that come in without progress",
	"messages that wait for one device",
	"silence of a device",
	"agent's inbox",
	"reports of a device",
	"`dunlin infer`",
}

// TestLimits: docs/limits.md has the figures that the code has.
func TestLimits(t *testing.T) {
	page, err := os.ReadFile("../../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for line := range strings.Lines(string(page)) {
		if cells := strings.Split(line, " | "); len(cells) >= 3 && strings.HasPrefix(line, "| ") {
			rows[strings.TrimPrefix(cells[0], "| ")] = cells[1] + " | " + cells[2]
		}
	}
	c := &constants{t, map[string]map[string]ast.Expr{}, map[string]map[string]string{}}
	for row, names := range limits {
		text, ok := rows[row]
		if !ok {
			t.Errorf("docs/limits.md has no row %q", row)
			continue
		}
		for name := range strings.FieldsSeq(names) {
			name, unit, _ := strings.Cut(name, ":")
			n, err := c.value(name)
			if err != nil {
				t.Errorf("%s: %v", row, err)
				continue
			}
			forms := written(n, unit)
			if !slices.ContainsFunc(forms, func(f string) bool {
				return regexp.MustCompile(`(^|[^\d.])` + regexp.QuoteMeta(f) + `($|\D)`).MatchString(text)
			}) {
				t.Errorf("docs/limits.md: %s: %s; %s is %q", row, text, name, forms)
			}
		}
	}
	ofSettings := []string{"`--profile-duty`", "what no version refers to in the registry"}
	for row := range rows {
		_, held := limits[row]
		if !held && row != "limit" && row != "---" && !slices.Contains(unheld, row) && !slices.Contains(ofSettings, row) {
			t.Errorf("docs/limits.md: %s: no constant is named for it", row)
		}
	}
	for _, row := range unheld {
		if _, ok := rows[row]; !ok {
			t.Errorf("docs/limits.md has no row %q", row)
		}
	}
	for _, bad := range []string{"models.NoSuch", "models.chunkWindowThatIsNot"} {
		if _, err := c.value(bad); err == nil {
			t.Errorf("%s has a value", bad)
		}
	}
}

// TestLimitsOfSettings: the bounds of settings in docs/limits.md are those that
// the programs hold settings to.
func TestLimitsOfSettings(t *testing.T) {
	page, err := os.ReadFile("../../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	none := func(string) string { return "" }
	ofAgent := func(flag, value string) error {
		_, err := agent.ParseConfig([]string{"--" + flag, value}, none, io.Discard)
		return err
	}
	alone := func(flag, value string) error {
		_, err := agent.ParseAlone([]string{"--" + flag, value, "model.onnx"}, none, io.Discard)
		return err
	}
	ofController := func(flag, value string) error {
		_, err := controller.LoadConfig([]string{"--" + flag, value}, none, io.Discard)
		return err
	}
	for _, tt := range []struct {
		flag        string
		least, most int
		says        string // on the page
		set         func(flag, value string) error
	}{
		{"poll-seconds", 1, 86400, "| `--poll-seconds` / `--threads` | 1 to 86400 / 1024 |", alone},
		{"threads", -1, 1024, "| `--poll-seconds` / `--threads` | 1 to 86400 / 1024 |", ofAgent},
		{"memory-mib", -1, 16777216, "| `--memory-mib` / `--cache-mib` | 16777216 each |", ofAgent},
		{"cache-mib", -1, 16777216, "| `--memory-mib` / `--cache-mib` | 16777216 each |", ofAgent},
		{"profile-duty", 0, 100, "| `--profile-duty` | 1 to 100; 0 is as without it |", ofAgent},
		{"event-days", 0, 3650, "`--event-days` 400 (0 to 3650;", ofController},
		{"audit-days", 0, 3650, "`--audit-days` (0 to 3650;", ofController},
		{"telemetry-hours", 1, 744, "`--telemetry-hours` 24 (1 to 744)", ofController},
		{"telemetry-days", 1, 400, "`--telemetry-days` 14 (1 to 400)", ofController},
		{"telemetry-long-days", 1, 3650, "`--telemetry-long-days` 400 (1 to 3650)", ofController},
		{"registry-grace-days", 0, 3650, "`--registry-grace-days` 7 (0 to 3650;", ofController},
	} {
		if !strings.Contains(string(page), tt.says) {
			t.Errorf("docs/limits.md does not say %s", tt.says)
		}
		complains := func(n int) bool {
			err := tt.set(tt.flag, strconv.Itoa(n))
			return err != nil && strings.Contains(err.Error(), tt.flag)
		}
		if complains(tt.most) || !complains(tt.most+1) {
			t.Errorf("--%s: the most is not %d: %v, %v", tt.flag, tt.most, tt.set(tt.flag, strconv.Itoa(tt.most)), tt.set(tt.flag, strconv.Itoa(tt.most+1)))
		}
		if tt.least >= 0 && (complains(tt.least) || !complains(tt.least-1)) {
			t.Errorf("--%s: the least is not %d: %v, %v", tt.flag, tt.least, tt.set(tt.flag, strconv.Itoa(tt.least)), tt.set(tt.flag, strconv.Itoa(tt.least-1)))
		}
	}
}
