"""What features describe."""

from headrace import Entity

user = Entity("user", key="user_id", forget_after="90d", doc="A shopper, signed in or not")
item = Entity("item", key="item_id", forget_after="90d", doc="One second-hand piece on offer")
seller = Entity("seller", key="seller_id", forget_after="90d", doc="Who offers it")
