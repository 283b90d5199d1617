web = [("@orbstack/web", {"orbstack_image": "debian:bookworm"})]
db = [("@orbstack/db", {"orbstack_image": "debian:bookworm"})]
