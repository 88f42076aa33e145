package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/dunlin/dunlin/models/tensor"
)

// maxInFlight bounds the calls of an open loop that wait for an answer.
const maxInFlight = 4096

// warmUp is how long a load runs before what it measures counts.
const warmUp = 150 * time.Millisecond

// Load is what a client process does to one model of one server.
type Load struct {
	REST    bool // by REST with binary tensors; otherwise by gRPC
	Address string
	Model   string
	Input   tensor.Info // of one row: no dimension is open
	Bytes   int         // of an answer's tensors
	For     time.Duration

	// Concurrency is how many callers call one after the other.
	Concurrency int
	// Rate, where set, has calls begin this often a second, after pauses of an
	// exponential distribution, however many go on.
	Rate        float64
	Seed        uint64        // of input and pauses
	Connections int           // 0: one
	Deadline    time.Duration // of each call; 0: none
}

// Result is what a load found.
type Result struct {
	Elapsed time.Duration
	OK      int    // answered, and inside the deadline where there is one
	OKSoon  int    // of these, before Elapsed was over
	Late    int    // answered or given up after the deadline
	Refused int    // answered by an error that says so, before the deadline
	Failed  int    // all other errors
	Error   string // the last of those that failed or were refused

	P50, P90, P99, Most time.Duration // of OK
	RefusedWhy          map[string]int

	RefusedP50, RefusedP90, RefusedP99, RefusedMost time.Duration

	Lag time.Duration // p99 of how late an open loop began its calls
}

// rate gives the answers of a second.
func (r Result) rate() float64 { return float64(r.OK) / r.Elapsed.Seconds() }

// errRefused is the error of a call that the server refused to serve now.
var errRefused = errors.New("refused")

// refusedError says with which code.
type refusedError struct{ code string }

func (e refusedError) Error() string        { return "refused: " + e.code }
func (e refusedError) Is(target error) bool { return target == errRefused }

// caller calls a server.
type caller interface {
	call(ctx context.Context) error
	close()
}

// loadProcess is the client process: it prints its result as JSON.
func loadProcess(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: load JSON")
	}
	var l Load
	if err := json.Unmarshal([]byte(args[0]), &l); err != nil {
		return fmt.Errorf("read the load: %w", err)
	}
	result, err := l.run(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

// data gives the input's values, normally distributed.
func (l *Load) data() ([]byte, error) {
	n, err := tensor.Elements(l.Input.Shape)
	if err != nil {
		return nil, err
	}
	if l.Input.Type != tensor.Float32 {
		return nil, fmt.Errorf("input of type %s", l.Input.Type)
	}
	rng := rand.New(rand.NewPCG(l.Seed, 1))
	b := make([]byte, 0, 4*n)
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(rng.NormFloat64())))
	}
	return b, nil
}

func (l *Load) run(ctx context.Context) (Result, error) {
	callers, err := l.connect()
	if err != nil {
		return Result{}, err
	}
	defer func() {
		for _, c := range callers {
			c.close()
		}
	}()
	if l.Rate > 0 {
		for _, c := range callers {
			if err := c.call(ctx); err != nil {
				return Result{}, fmt.Errorf("first call of %s: %w", l.Model, err)
			}
		}
		return l.open(ctx, callers), nil
	}
	warm := *l
	warm.For = warmUp
	if r := warm.closed(ctx, callers); r.Failed > 0 || r.OK == 0 {
		return Result{}, fmt.Errorf("first calls of %s: %d failed, %d refused: %s", l.Model, r.Failed, r.Refused, r.Error)
	}
	return l.closed(ctx, callers), nil
}

func (l *Load) connect() ([]caller, error) {
	data, err := l.data()
	if err != nil {
		return nil, err
	}
	var all []caller
	for range max(l.Connections, 1) {
		c, err := l.newCaller(data)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func (l *Load) newCaller(data []byte) (caller, error) {
	if l.REST {
		return newREST(l, data)
	}
	return newGRPC(l, data)
}

// outcome is one call's.
type outcome struct {
	took time.Duration
	err  error
	soon bool // ended before the load's time was over
	lag  time.Duration
}

// once makes one call.
func (l *Load) once(ctx context.Context, c caller) outcome {
	if l.Deadline > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.Deadline)
		defer cancel()
	}
	began := time.Now()
	err := c.call(ctx)
	return outcome{took: time.Since(began), err: err}
}

func (l *Load) closed(ctx context.Context, callers []caller) Result {
	all := make([][]outcome, l.Concurrency)
	var group sync.WaitGroup
	began := time.Now()
	for i := range all {
		group.Go(func() {
			outcomes := make([]outcome, 0, 1<<16)
			for time.Since(began) < l.For && ctx.Err() == nil {
				outcomes = append(outcomes, l.once(ctx, callers[i%len(callers)]))
			}
			all[i] = outcomes
		})
	}
	group.Wait()
	return l.sum(slices.Concat(all...), time.Since(began))
}

func (l *Load) open(ctx context.Context, callers []caller) Result {
	rng := rand.New(rand.NewPCG(l.Seed, 2))
	var group sync.WaitGroup
	var mu sync.Mutex
	var all []outcome // guarded by mu
	add := func(o outcome) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, o)
	}
	places := make(chan struct{}, maxInFlight)
	began := time.Now()
	var due time.Duration
	for i := 0; ctx.Err() == nil; i++ {
		due += time.Duration(rng.ExpFloat64() / l.Rate * float64(time.Second))
		if due > l.For {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(due - time.Since(began)):
		}
		lag := time.Since(began) - due
		select {
		case places <- struct{}{}:
		default:
			add(outcome{err: fmt.Errorf("%d calls wait already", maxInFlight), lag: lag})
			continue
		}
		group.Go(func() {
			o := l.once(ctx, callers[i%len(callers)])
			o.soon, o.lag = time.Since(began) < l.For, lag
			<-places
			add(o)
		})
	}
	group.Wait()
	return l.sum(all, l.For)
}

// sum counts outcomes. What ended after its deadline is late however it
// ended: the client cannot tell whether the server had refused it.
func (l *Load) sum(all []outcome, elapsed time.Duration) Result {
	r := Result{Elapsed: elapsed, RefusedWhy: map[string]int{}}
	var ok, refused, lags []time.Duration
	for _, o := range all {
		why, wasRefused := errors.AsType[refusedError](o.err)
		switch {
		case l.Deadline > 0 && o.took >= l.Deadline:
			r.Late++
		case o.err == nil:
			ok = append(ok, o.took)
			if o.soon {
				r.OKSoon++
			}
		case wasRefused:
			refused = append(refused, o.took)
			r.RefusedWhy[why.code]++
			r.Error = o.err.Error()
		default:
			r.Failed++
			r.Error = o.err.Error()
		}
		lags = append(lags, o.lag)
	}
	r.OK, r.Refused = len(ok), len(refused)
	slices.Sort(ok)
	slices.Sort(refused)
	slices.Sort(lags)
	r.P50, r.P90, r.P99, r.Most = percentile(ok, 50), percentile(ok, 90), percentile(ok, 99), percentile(ok, 100)
	r.RefusedP50, r.RefusedP90 = percentile(refused, 50), percentile(refused, 90)
	r.RefusedP99, r.RefusedMost = percentile(refused, 99), percentile(refused, 100)
	r.Lag = percentile(lags, 99)
	return r
}
