package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dunlin/dunlin/internal/e2e"
)

// side is one of those that are compared.
type side struct {
	name string
	run  func(context.Context) (Result, error)
}

func (b *bench) clientSide(name string, l Load) side {
	return side{name, func(ctx context.Context) (Result, error) { return b.client(ctx, l, "") }}
}

// interleave runs the sides in turn, in each second round backwards, so that
// what the machine does meanwhile hits all of them. It gives the rounds of
// each side.
func (b *bench) interleave(ctx context.Context, sides ...side) ([][]Result, error) {
	all := make([][]Result, len(sides))
	for round := range b.rounds {
		for i := range sides {
			if round%2 == 1 {
				i = len(sides) - 1 - i
			}
			r, err := sides[i].run(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", sides[i].name, round+1, err)
			}
			all[i] = append(all[i], r)
		}
	}
	return all, nil
}

// title begins a table; the median of the rounds comes first, the least and
// the most follow in brackets.
func (b *bench) title(format string, args ...any) {
	fmt.Printf("\n%s: %d rounds of %s, median (least to most)\n", fmt.Sprintf(format, args...), b.rounds, b.slice)
}

func printSides(sides []side, all [][]Result) {
	for i, s := range sides {
		var rates, p50, p99 []float64
		for _, r := range all[i] {
			rates = append(rates, r.rate())
			p50 = append(p50, microseconds(r.P50))
			p99 = append(p99, microseconds(r.P99))
		}
		fmt.Printf("  %-28s %s/s, p50 %.0f us, p99 %.0f us\n", s.name, spreadOf(rates).format("%.1f"), spreadOf(p50).Median, spreadOf(p99).Median)
	}
}

// ratio prints the ratio of two sides' rates, round by round, and gives the median.
func ratio(what string, a, b []Result) float64 {
	s := spreadOf(each(a, b, func(a, b Result) float64 { return a.rate() / b.rate() }))
	fmt.Printf("  %-28s %s\n", what, s.format("%.3f"))
	return s.Median
}

// address is that of an agent's REST port.
func address(a *e2e.Alone) string { return strings.TrimPrefix(a.URL, "http://") }

// measureResNet compares one client's throughput with a bare loop.
func measureResNet(ctx context.Context, b *bench) error {
	raw, err := b.startRaw(ctx, "resnet50")
	if err != nil {
		return err
	}
	a, err := b.mainAgent(ctx)
	if err != nil {
		return err
	}
	rest := b.load(address(a), "resnet50")
	rest.REST = true
	sides := []side{{"bare loop", raw}, b.clientSide("agent, REST binary", rest), b.clientSide("agent, gRPC", b.load(a.GRPC, "resnet50"))}
	all, err := b.interleave(ctx, sides...)
	if err != nil {
		return err
	}
	b.title("ResNet-50, one client")
	printSides(sides, all)
	b.figures["resnet50_vs_raw"] = min(ratio("REST / bare loop", all[1], all[0]), ratio("gRPC / bare loop", all[2], all[0]))
	return nil
}

// measureTiny compares what a call costs with a bare server and MLServer.
func measureTiny(ctx context.Context, b *bench) error {
	a, err := b.mainAgent(ctx)
	if err != nil {
		return err
	}
	echo, err := b.startEcho(ctx, b.load("", "mlp").Bytes)
	if err != nil {
		return err
	}
	at := func(address string, concurrency int) Load {
		l := b.load(address, "mlp")
		l.Concurrency = concurrency
		return l
	}

	sides := []side{b.clientSide("gRPC echo", at(echo, 1)), b.clientSide("agent, gRPC", at(a.GRPC, 1))}
	all, err := b.interleave(ctx, sides...)
	if err != nil {
		return err
	}
	b.title("tiny MLP, concurrency 1")
	printSides(sides, all)
	added := spreadOf(each(all[1], all[0], func(a, b Result) float64 { return microseconds(a.P50 - b.P50) }))
	fmt.Printf("  %-28s %s us\n", "agent's p50 - echo's", added.format("%.1f"))
	b.figures["overhead_p50_us"] = added.Median

	const concurrency = 8
	sides = []side{b.clientSide("gRPC echo", at(echo, concurrency)), b.clientSide("agent, gRPC", at(a.GRPC, concurrency))}
	// As it is installed, MLServer too has its model in a worker process.
	mlserver, missing := b.startMLServer(ctx, 1)
	if missing == nil {
		sides = append(sides, b.clientSide("MLServer, gRPC", at(mlserver, concurrency)))
		if mlserver, missing = b.startMLServer(ctx, 0); missing == nil {
			sides = append(sides, b.clientSide("MLServer without worker", at(mlserver, concurrency)))
		}
	}
	if all, err = b.interleave(ctx, sides...); err != nil {
		return err
	}
	b.title("tiny MLP, concurrency %d", concurrency)
	printSides(sides, all)
	b.figures["tiny_grpc_vs_echo"] = ratio("agent / echo", all[1], all[0])
	if missing != nil {
		fmt.Printf("  no MLServer: %v\n", missing)
		return nil
	}
	b.figures["tiny_grpc_vs_mlserver"] = ratio("agent / MLServer", all[1], all[2])
	ratio("agent / MLServer w/o worker", all[1], all[3])
	return nil
}

// measureBatch compares dynamic batching with none.
func measureBatch(ctx context.Context, b *bench) error {
	a, err := b.mainAgent(ctx)
	if err != nil {
		return err
	}
	const concurrency = 16
	best := ""
	for _, net := range []string{"encoder", "digits"} {
		var sides []side
		for _, suffix := range []string{"-single", ""} {
			var l Load
			if net == "digits" {
				l = b.digits(a.GRPC, net+suffix)
			} else {
				l = b.load(a.GRPC, net)
				l.Model += suffix
			}
			l.Concurrency = concurrency
			name := net + ", batching"
			if suffix != "" {
				name = net + ", batching off"
			}
			sides = append(sides, b.clientSide(name, l))
		}
		all, err := b.interleave(ctx, sides...)
		if err != nil {
			return err
		}
		if net == "encoder" {
			b.title("transformer encoder, %d tokens, gRPC, concurrency %d", tokens, concurrency)
		} else {
			b.title("digits, gRPC, concurrency %d", concurrency)
		}
		printSides(sides, all)
		if gain := ratio("batching / batching off", all[1], all[0]); best == "" || gain > b.figures["batch_gain"] {
			b.figures["batch_gain"], best = gain, net
		}
	}
	fmt.Printf("  the larger gain is that of the %s net\n", best)
	return nil
}

// measureOverload offers one processor three times what it can do.
func measureOverload(ctx context.Context, b *bench) error {
	cpus, err := processors()
	if err != nil {
		return err
	}
	if len(cpus) < 2 {
		fmt.Printf("\noverload: not measured, it needs two processors\n")
		return nil
	}
	serverCPU, clientCPUs := cpus[0], strings.Join(cpus[1:], ",")
	repository, err := b.repository("overload", map[string]struct{ file, config string }{"resnet50": {b.net("resnet50"), ""}})
	if err != nil {
		return err
	}
	a, err := b.startAgent(ctx, "overload", repository, serverCPU, 1)
	if err != nil {
		return err
	}
	const (
		factor      = 3
		deadline    = 500 * time.Millisecond
		connections = 8
	)
	steady := b.load(a.GRPC, "resnet50")
	steady.Concurrency, steady.Connections, steady.For = 2, 2, max(2*b.slice, 2*time.Second)
	before, err := b.client(ctx, steady, clientCPUs)
	if err != nil {
		return err
	}
	over := steady
	over.Connections, over.Deadline, over.For, over.Rate = connections, deadline, b.overload, factor*before.rate()
	r, err := b.client(ctx, over, clientCPUs)
	if err != nil {
		return err
	}
	after, err := b.client(ctx, steady, clientCPUs)
	if err != nil {
		return err
	}
	capacity := (before.rate() + after.rate()) / 2
	goodput := float64(r.OKSoon) / r.Elapsed.Seconds() / capacity
	fmt.Printf("\noverload, ResNet-50, gRPC: one runtime thread on processor %s, clients on %s, deadline %s\n", serverCPU, clientCPUs, deadline)
	fmt.Printf("  %-28s %.2f/s before, %.2f/s after\n", fmt.Sprintf("capacity, %d clients", steady.Concurrency), before.rate(), after.rate())
	fmt.Printf("  %-28s %.1f/s for %s, Poisson, seed %d, begun at most %.2f ms late (p99)\n",
		"offered", over.Rate, over.For, over.Seed, milliseconds(r.Lag))
	fmt.Printf("  %-28s %d, %.3f of capacity, p50 %.0f ms, p99 %.0f ms, most %.0f ms\n",
		"answered in time", r.OK, goodput, milliseconds(r.P50), milliseconds(r.P99), milliseconds(r.Most))
	fmt.Printf("  %-28s %d\n", "accepted, but late", r.Late)
	fmt.Printf("  %-28s %d %v, p50 %.2f ms, p90 %.2f ms, p99 %.2f ms, most %.2f ms\n", "refused", r.Refused, r.RefusedWhy,
		milliseconds(r.RefusedP50), milliseconds(r.RefusedP90), milliseconds(r.RefusedP99), milliseconds(r.RefusedMost))
	b.figures["overload_goodput"] = goodput
	b.figures["reject_p99_ms"] = milliseconds(r.RefusedP99)
	return nil
}

// processors lists those that this process may use.
func processors() ([]string, error) {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(raw)) {
		list, ok := strings.CutPrefix(line, "Cpus_allowed_list:")
		if !ok {
			continue
		}
		return expand(strings.TrimSpace(list))
	}
	return nil, fmt.Errorf("/proc/self/status of %s has no Cpus_allowed_list", runtime.GOOS)
}

// expand gives the numbers of a list like "0-2,5".
func expand(list string) (all []string, err error) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		if err != nil {
			return nil, fmt.Errorf("list of processors %q: %w", list, err)
		}
		to, err := strconv.Atoi(last)
		if err != nil {
			return nil, fmt.Errorf("list of processors %q: %w", list, err)
		}
		for i := from; i <= to; i++ {
			all = append(all, strconv.Itoa(i))
		}
	}
	return slices.Compact(all), nil
}
