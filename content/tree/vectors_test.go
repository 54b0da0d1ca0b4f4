package tree

const (
	vectorLayer   = "1c34b4480c59f6b5628d203de598790967cc48928e7a2942dd263a5882f55f81"
	vectorPayload = "8cc5981f79b6a2c05265af82e0e4a9f8e7ad8a8532a663bb5ed5498ee4eeb184"
)
