package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/dunlin/dunlin/models/tensor"
)

// kind says what a message is about.
type kind byte

// The kinds. The parent asks, the child answers each question but cancel,
// lane and cancelRun once, with the question's sequence number. Runs have
// packets and sockets of their own, see ort.Lanes.
const (
	// kindInit opens the runtime: strings = library; or library, poolSettings
	// in JSON; number = threads.
	kindInit kind = iota + 1
	// kindActivate opens a model as session: strings = folder, entry; or
	// strings = compiled file, and number = 1 has its weights prepacked; threads
	// as in ort.Setting. With folder, entry, number = inPool puts them into a
	// pool of memory addresses.
	kindActivate
	// kindDeactivate closes session, and its pool.
	kindDeactivate
	// kindOut has the weights of a session leave its pool, and kindIn brings
	// them back; between them it cannot be run.
	kindOut
	kindIn
	// kindPooling asks whether the runtime puts weights into a pool; kindDone
	// answers with number = 1 for yes, strings = device, reason.
	kindPooling
	// kindCancel asks for the early end of the question with this sequence number.
	kindCancel
	// kindLane begins the lane number on the socket that comes with it.
	kindLane
	// kindCancelRun asks for the early end of the lane number's run with this
	// sequence number.
	kindCancelRun
	// kindCompile compiles a model and measures it: strings = folder, entry,
	// file to write.
	kindCompile
	// kindMeasure measures a version: strings = measureQuestion in JSON; kindDone
	// answers with measured in JSON.
	kindMeasure
	// kindDone answers: init with strings = version, providers..., number =
	// sandbox, where pools were asked for after poolsFound in JSON; activate with
	// inputs, outputs, batch, number = nanoseconds, memory, and of one in a pool
	// strings = holding in JSON; compile likewise, with findings.
	kindDone
	// kindFailed answers: strings = what went wrong.
	kindFailed
	// kindOutOfMemory answers what failed for want of memory: strings = what
	// the runtime said.
	kindOutOfMemory
	// kindCancelled answers a question that was cancelled.
	kindCancelled
	kinds // one past the last
)

// message is what parent and child send each other. Which fields count
// depends on its kind.
type message struct {
	kind            kind
	batch           bool
	seq             uint64
	session         uint64
	number          uint64
	memory          uint64 // bytes that the child grew by, apart from what is mapped
	threads         uint64
	strings         []string
	inputs, outputs []tensor.Info
}

// maxRank bounds the dimensions that decode accepts: ONNX Runtime's own
// models stay below; ort refuses more.
const maxRank = 32

// encode gives the bytes of a message.
func (m *message) encode() []byte {
	b := make([]byte, 0, 256)
	b = append(b, byte(m.kind), 0)
	if m.batch {
		b[1] = 1
	}
	for _, n := range []uint64{m.seq, m.session, m.number, m.memory, m.threads} {
		b = binary.AppendUvarint(b, n)
	}
	b = binary.AppendUvarint(b, uint64(len(m.strings)))
	for _, s := range m.strings {
		b = appendString(b, s)
	}
	for _, infos := range [][]tensor.Info{m.inputs, m.outputs} {
		b = binary.AppendUvarint(b, uint64(len(infos)))
		for _, i := range infos {
			b = appendInfo(b, i)
		}
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendInfo writes the rank plus one, and 0 for a shape that is nil.
func appendInfo(b []byte, i tensor.Info) []byte {
	b = appendString(b, i.Name)
	b = binary.AppendUvarint(b, uint64(i.Type))
	if i.Shape == nil {
		return binary.AppendUvarint(b, 0)
	}
	b = binary.AppendUvarint(b, uint64(len(i.Shape))+1)
	for _, d := range i.Shape {
		b = binary.AppendVarint(b, d)
	}
	return b
}

// errMalformed is the error of a message that breaks the format.
var errMalformed = errors.New("malformed message")

// decode reads a message, which shares nothing with b.
func decode(b []byte) (*message, error) {
	d := &decoder{b: b}
	m := &message{kind: kind(d.byte())}
	batch := d.byte()
	if m.kind == 0 || m.kind >= kinds || batch > 1 {
		return nil, fmt.Errorf("%w: kind %d", errMalformed, m.kind)
	}
	m.batch = batch == 1
	for _, n := range []*uint64{&m.seq, &m.session, &m.number, &m.memory, &m.threads} {
		*n = d.uvarint()
	}
	for range d.count() {
		m.strings = append(m.strings, d.string())
	}
	for range d.count() {
		m.inputs = append(m.inputs, d.info())
	}
	for range d.count() {
		m.outputs = append(m.outputs, d.info())
	}
	if d.failed || d.at != len(b) {
		return nil, fmt.Errorf("%w: its %d bytes end early or late, or hold a bad number", errMalformed, len(b))
	}
	return m, nil
}

// decoder reads values until one fails; from then on it gives zeros.
type decoder struct {
	b      []byte
	at     int
	failed bool
}

func (d *decoder) fail() { d.failed, d.at = true, len(d.b) }

func (d *decoder) byte() byte {
	if d.at >= len(d.b) {
		d.fail()
		return 0
	}
	d.at++
	return d.b[d.at-1]
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b[d.at:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.at += n
	return v
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.b[d.at:])
	if n <= 0 {
		d.fail()
		return 0
	}
	d.at += n
	return v
}

// count reads a number of things to come, each at least a byte long.
func (d *decoder) count() int {
	n := d.uvarint()
	if n > uint64(len(d.b)-d.at) {
		d.fail()
		return 0
	}
	return int(n)
}

func (d *decoder) string() string {
	n := d.count()
	s := string(d.b[d.at : d.at+n])
	d.at += n
	return s
}

func (d *decoder) info() tensor.Info {
	i := tensor.Info{Name: d.string()}
	typ := d.uvarint()
	if typ > math.MaxInt32 || !tensor.Type(typ).Known() {
		d.fail()
		return i
	}
	i.Type = tensor.Type(typ)
	rank := d.uvarint()
	if rank == 0 {
		return i
	}
	if rank > maxRank+1 {
		d.fail()
		return i
	}
	i.Shape = make([]int64, rank-1)
	for n := range i.Shape {
		i.Shape[n] = d.varint()
	}
	return i
}
