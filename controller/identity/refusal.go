package identity

import "context"

// Refusal is something that was asked for and refused.
type Refusal struct {
	// Who asked, and from which address; where they are empty, the principal
	// in the context says it.
	Who, From string
	Action    string // dotted lower-case name: "call.refused"
	Object    string // a procedure, a path, a topic, "device/NAME"
	Reason    string
}

// Refusals takes note of what was refused; store implements it. It returns at
// once, and may be called for each message that anybody sends.
type Refusals interface {
	Refused(ctx context.Context, r Refusal)
}
