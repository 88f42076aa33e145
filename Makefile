.DEFAULT_GOAL := help
.PHONY: help bench-overcommit build runtime test lint lint-go lint-proto lint-vuln proto proto-release fuzz demo up bench-footprint bench-serving bench-activate bench-crash clean

# Tools run from the module cache at these versions; nothing is installed.
BUF         := go run github.com/bufbuild/buf/cmd/buf@v1.71.0
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := go run golang.org/x/vuln/cmd/govulncheck@v1.8.0

# NVML's header marks functions that its binding calls as deprecated.
export CGO_CFLAGS := -O2 -g -Wno-deprecated-declarations

# make build VERSION=0.7.1 builds that version; without it, the one that the source is of.
VERSION  ?=
GOBUILD  := go build -trimpath -ldflags='-s -w $(if $(VERSION),-X github.com/dunlin/dunlin/internal/program.version=$(VERSION))'
FUZZTIME ?= 30s

# Puts the path of the ONNX Runtime library into the environment of what follows.
WITH_RUNTIME = DUNLIN_ORT_LIB=$$(sh agent/ort/fetch-runtime.sh) && export DUNLIN_ORT_LIB &&

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

build: ## Build the three programs into bin/
	CGO_ENABLED=0 $(GOBUILD) -o bin/ ./cmd/dunlin ./cmd/dunlin-controller
	CGO_ENABLED=1 $(GOBUILD) -o bin/ ./cmd/dunlin-agent

.PHONY: man
man: ## Write the manual pages of the command line into build/man/
	@rm -rf build/man && go run ./cmd/dunlin man build/man

.PHONY: cross
cross: ## Build the agent for linux/arm64, glibc 2.31 or newer, into bin/linux-arm64/
	@VERSION=$(VERSION) sh internal/cross/build.sh

.PHONY: deb test-deb
deb: ## Build Debian packages of the three programs into bin/deb/; ARCH=arm64 for most devices
	@VERSION=$(VERSION) ARCH=$(ARCH) sh internal/deb/build.sh bin/deb

test-deb: ## Build Debian packages, look into them, and, as root, install and purge them in a folder
	DUNLIN_DEB=1 go test -count=1 -timeout 20m -v ./internal/deb

runtime: ## Fetch the ONNX Runtime library into .cache/ and print its path
	@sh agent/ort/fetch-runtime.sh

test: ## Set up what the tests need and run them all with the race detector
	@sh internal/e2e/setup.sh
	$(WITH_RUNTIME) PATH="$$PATH:/usr/sbin" go test -race -timeout 20m ./...

lint: lint-go lint-proto lint-vuln ## Check the Go code, the protocol and the dependencies

lint-go:
	@out=$$(gofmt -l .); test -z "$$out" || { echo "not formatted by gofmt:"; echo "$$out"; exit 1; }
	go mod tidy -diff
	go vet ./...
	$(STATICCHECK) ./...
	@echo 'go fix -diff ./...'; out=$$(go fix -diff ./...) || true; test -z "$$out" || { echo "$$out"; exit 1; }

lint-proto:
	cd proto && $(BUF) lint
	cd proto && $(BUF) breaking --against released.binpb
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	(cd proto && $(BUF) generate -o "$$tmp" && $(BUF) generate --template buf.gen.inference.yaml -o "$$tmp") && \
	diff -r -x '*.proto' -x '*.yaml' -x '*.binpb' -x doc.go "$$tmp" proto || { echo "generated code is not current: run make proto"; exit 1; }

# The database is a web site; without access to it there is nothing to check.
lint-vuln:
	@echo '$(GOVULNCHECK) ./...'; out=$$($(GOVULNCHECK) ./... 2>&1) || \
	case $$out in \
	*"fetching vulnerabilities"*) echo "$$out"; echo "not checked for known vulnerabilities: the database did not answer" ;; \
	*) echo "$$out"; exit 1 ;; \
	esac

proto: ## Generate Go from proto/
	cd proto && $(BUF) generate && $(BUF) generate --template buf.gen.inference.yaml

proto-release: ## Record the protocol as released: make lint refuses to break it afterwards
	cd proto && $(BUF) build --exclude-source-info -o released.binpb

fuzz: ## Run each fuzz test for FUZZTIME (default 30s)
	@$(WITH_RUNTIME) for pkg in $$(go list ./...); do \
		list=$$(go test -list '^Fuzz' $$pkg) || { echo "$$list"; exit 1; }; \
		for name in $$(echo "$$list" | grep '^Fuzz'); do \
			echo "== $$pkg $$name"; \
			go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$pkg || exit 1; \
		done; \
	done

demo: ## Show the whole path: push, deploy, classify, roll out; then clean up
	@go run ./internal/e2e/demo

.PHONY: bench-alarms
bench-alarms: ## Measure how well trouble is predicted, on generated telemetry of which the truth is known
	@go run ./bench/alarms
.PHONY: bench-route
bench-route: ## Measure what it costs to decide where a request goes, and what a cascade gives
	@$(WITH_RUNTIME) go build -o bin/route ./bench/route && bin/route
.PHONY: bench-profile
bench-profile: ## Hold the search for how a model runs best against measuring everything, and profile beside live traffic
	@$(WITH_RUNTIME) go build -o bin/profile ./bench/profile && bin/profile

.PHONY: bench-swap gpu-check
bench-swap: ## Measure how fast weights leave a GPU and come back; on a fake one, whether they do
	@go run ./bench/swap

gpu-check: ## Check pools of weights and ONNX Runtime's CUDA provider on a GPU, where there is one
	@go run ./bench/gpucheck

up: ## The demo, left running, with its URLs
	@go run ./internal/e2e/demo --stay

bench-footprint: build ## Measure memory, start time and idle CPU of agent and controller
	@$(WITH_RUNTIME) go run ./bench/footprint

bench-serving: build ## Compare serving with the bare runtime, a bare gRPC server and MLServer
	@$(WITH_RUNTIME) go run ./bench/serving

bench-activate: ## Measure the first answer of models whose weights are out
	@$(WITH_RUNTIME) MALLOC_ARENA_MAX=2 go run ./bench/activate

bench-crash: ## Measure how long callers wait when the worker process is killed
	@$(WITH_RUNTIME) go run ./bench/crash

.PHONY: bench-delta
bench-delta: ## Measure what travels when a model changes, and how fast a whole one comes, against curl
	@go run ./bench/delta

.PHONY: bench-identity
bench-identity: ## Measure devices that join, connect, are revoked and change authority; try who may do what
	@go run ./bench/identity

.PHONY: test-faults test-links
FAULTS ?= 500
test-faults: ## Have FAULTS (default 500) faults befall a controller, 3 agents and 200 simulated devices; DUNLIN_SEED repeats a run
	@$(WITH_RUNTIME) FAULTS=$(FAULTS) FAULTS_DEVICES=200 FAULTS_AGENTS=3 go test -race -count=1 -timeout 60m -run '^TestFaults$$' -v ./internal/e2e
	DUNLIN_SEEDS=20 go test -count=1 -timeout 60m -run '^TestRandomFaults$$' -v ./agent/simfleet

test-links: ## Devices on links with a round trip of 100 ms, 100 kbit/s, and 10 % and 30 % of the packets lost: in simulated time, and against a controller that is a process; DUNLIN_SEED repeats a run's chances
	DUNLIN_SEEDS=20 go test -count=1 -timeout 60m -run '^TestBadLinks$$' -v ./agent/simfleet
	$(WITH_RUNTIME) LINKS=full go test -count=1 -timeout 20m -run '^TestBadLinks$$' -v ./internal/e2e

.PHONY: bench-fleet
DEVICES ?= 10000
bench-fleet: ## One controller with DEVICES (default 10000) simulated devices: connect, change, restart; against a bare broker
	@go build -o bin/bench-fleet ./bench/fleet && bin/bench-fleet --devices $(DEVICES)

.PHONY: bench-console
bench-console: ## The web console with DEVICES (default 10000) simulated devices, 200 models and 50 viewers: first byte, live updates, weight, axe
	@go build -o bin/bench-console ./bench/console && bin/bench-console --devices $(DEVICES)

.PHONY: bench-idle
MINUTES ?= 60
bench-idle: ## Count for MINUTES (default 60) what devices say and hear while nothing changes, after three minutes in which all settles
	@go build -o bin/bench-fleet ./bench/fleet && bin/bench-fleet --only-idle --devices 20 --idle $(MINUTES)m

bench-overcommit: ## Serve 40 models in memory for 5: against memory for all, sessions made anew, the disk
	@$(WITH_RUNTIME) go build -o bin/overcommit ./bench/overcommit && bin/overcommit

clean: ## Remove bin/ (the library in .cache/ stays)
	rm -rf bin
