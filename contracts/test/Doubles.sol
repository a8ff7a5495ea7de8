// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";

/// @dev A log whose heads are what one says, smaller than before too, as after a re-org.
contract HeadsOnly {
    mapping(bytes32 => uint64) private _sizes;

    function set(bytes32 logId, uint64 size) external {
        _sizes[logId] = size;
    }

    function headOf(bytes32 logId) external view returns (uint64, bytes32, address) {
        return (_sizes[logId], bytes32(0), address(0));
    }

    function ownerOf(bytes32) external view returns (address) {
        return address(this);
    }
}

/// @dev Tokens that misbehave.
abstract contract MintableToken is ERC20("Token", "T") {
    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }
}

/// @dev Keeps a hundredth of each transfer.
contract FeeToken is MintableToken {
    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (from != address(0) && to != address(0)) super._update(to, address(0), value / 100);
    }
}

/// @dev Gives the receiver more than was sent, as a positive rebase would.
contract GrowingToken is MintableToken {
    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (from != address(0) && to != address(0)) super._update(address(0), to, 1);
    }
}

/// @dev Refuses some receivers.
contract BlacklistToken is MintableToken {
    mapping(address => bool) private _refused;

    function refuse(address account, bool refused) external {
        _refused[account] = refused;
    }

    function _update(address from, address to, uint256 value) internal override {
        require(!_refused[to], "refused");
        super._update(from, to, value);
    }
}

/// @dev Calls back in the middle of a transfer, as tokens with hooks do. `outcome` is what the call came to.
contract CallbackToken is MintableToken {
    address private _target;
    bytes private _call;
    bool public succeeded;
    bytes public outcome;

    function arm(address target, bytes calldata call_) external {
        (_target, _call) = (target, call_);
    }

    function _update(address from, address to, uint256 value) internal override {
        if (_target != address(0)) {
            address target = _target;
            _target = address(0);
            (succeeded, outcome) = target.call(_call);
        }
        super._update(from, to, value);
    }
}

/// @dev Returns false and moves nothing.
contract FalseToken is MintableToken {
    function transferFrom(address, address, uint256) public pure override returns (bool) {
        return false;
    }
}
